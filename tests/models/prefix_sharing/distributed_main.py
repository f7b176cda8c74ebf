"""What `tests.distributed.launch` runs: DPO of a family that no test knows, where one process may disagree."""

from pathlib import Path

import torch
from accelerate.utils import gather_object

from tests.families import load_processor
from tests.trainers.dpo.helpers import rows
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.models import families
from trl_vlm.models.prefix_sharing import sharing
from trl_vlm.models.prefix_sharing.packing import Packing


def rejected(slots: Packing) -> torch.Tensor:
    """(1, L): where a packed batch of pairs has tokens of rejected replies."""
    return (slots.source >= slots.target.numel() // 2)[None]


def disagree() -> None:
    """Let replies of this process start at a wrong position."""
    right = sharing._positions
    sharing._positions = lambda backbone, slots, packed: right(backbone, slots, packed) + rejected(slots)


def trained(folder: Path, model: str, trainer_arguments: dict, **options) -> DPOTrainer:
    args = DPOConfig(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
        **trainer_arguments,
    )
    trainer = DPOTrainer(model, args=args, train_dataset=rows((1, 2, 1, 1)), processing_class=load_processor(model))
    trainer.sequences = []
    layer = trainer.model.base_model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: trainer.sequences.append(args[0].size(0)))
    trainer.train()
    return trainer


def losses(trainer: DPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(folder: Path, trainer_arguments: dict, model: str, disagreeing: int | None):
    plain = losses(trained(folder / "plain", model, trainer_arguments, share_prefix=False))
    del families.FAMILIES["llava"]
    if torch.distributed.get_rank() == disagreeing:
        disagree()
    trainer = trained(folder / "tried", model, trainer_arguments)
    hooks = trainer.model.base_model._forward_pre_hooks.values()
    (hook,) = (hook for hook in hooks if isinstance(hook, sharing._Pack))
    report = {"losses": losses(trainer), "plain": plain}
    report |= {"proven": gather_object([hook.is_proven]), "sequences": gather_object([trainer.sequences[-1]])}
    return trainer, report
