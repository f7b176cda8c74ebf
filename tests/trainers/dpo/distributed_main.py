"""What `tests.distributed.launch` runs: DPO of a tiny model, with its losses as the report."""

from pathlib import Path

from transformers import AutoModelForImageTextToText

from tests.encoded_images import watched
from tests.families import load_processor
from tests.trainers.dpo.helpers import lora, rows, with_weights
from trl_vlm import DPOConfig, DPOTrainer

IMAGE = {"image_weight": 1.0, "image_corruption": "mask", "image_mask_ratio": 0.7, "anchor_weight": 0.5}
IMAGES = (1, 2, 1, 1, 2, 1, 1, 1)


def main(
    folder: Path,
    trainer_arguments: dict,
    model: str,
    batch: int,
    adapter: bool = False,
    cache: bool = False,
    image: bool = False,
    checkpointing: bool = True,
    targets: str = "all-linear",
    options: dict | None = None,
):
    folder_of_model = model
    args = DPOConfig(
        str(folder / "out"),
        max_steps=4,
        per_device_train_batch_size=batch,
        learning_rate=1e-2 if adapter else 1e-3,
        logging_steps=1,
        max_length=None,
        dense_preset="paper",
        reference_cache=str(folder / "cache") if cache else None,
        save_strategy="no",
        report_to="none",
        **(IMAGE | {"image_seed": 0 if cache else None} if image else {}),
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
        **trainer_arguments,
        **(options or {}),
    )
    if adapter:
        # TRL seeds, then loads, then draws the adapter; loading draws other numbers when ZeRO-3 splits what it loads.
        model = AutoModelForImageTextToText.from_pretrained(folder_of_model)
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=with_weights(rows(IMAGES)) if image else rows(IMAGES),
        processing_class=load_processor(folder_of_model),
        peft_config=lora(targets) if adapter else None,
    )
    with watched(trainer.model) as passes:
        trainer.train()
    assert trainer.data_collator.shares_prefix
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "rewards/margins", "dense/margin_changed", "dense/changed_share")
    names += ("image/loss", "image/margin", "image/gain", "anchor/loss") if image else ()
    report = {name: [entry[name] for entry in entries] for name in names}
    return trainer, report | ({} if targets == "all-linear" else {"encoded": len(passes.pixels)})
