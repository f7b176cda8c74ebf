"""The supervised stage: a tower that sees, then a model that speaks, first exactly and then with a bias."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from trl_vlm.data.io.atomic import write_whole
from trl_vlm.models._transformers import keep_parameter_names
from trl_vlm.models.checkpoints import last_complete_checkpoint
from trl_vlm.testbed.model import build_model
from trl_vlm.testbed.processor import ATTRIBUTES, NOTHING, build_processor
from trl_vlm.testbed.stream import CaptionExamples, Stream, SupervisedCollator, TowerCollator, TowerPictures, cores
from trl_vlm.testbed.world import World

SUMMARY = "supervised.json"


@dataclass(frozen=True)
class SupervisedSettings:
    """How long and how fast the two stages train. The defaults pass the gates in about 150 CPU seconds.

    Attributes:
        tower_steps: Steps of stage 0, vision tower and projector alone.
        tower_batch: Pictures per step of stage 0.
        tower_learning_rate: Peak learning rate of stage 0.
        steps: Steps of supervised fine-tuning, projector and language model.
        batch: Pictures per step; each gives one caption and one conversation of six questions.
        learning_rate: Peak learning rate of supervised fine-tuning.
        exact_share: The first part of the steps, with exact captions and partners that tell nothing.
        facts_share: Share of pictures whose request begins with the facts.
        hidden_share: Share of pictures that are hidden from their caption, so that the model learns what is usually
            said. 0, the default, gives a model that never spoke without an image.
        warmup_steps: Linear warm-up of both stages.
        end_of_reply_weight: Weight of the end token after answers.
        save_steps: Steps between checkpoints.
        logging_steps: Steps between log lines.
    """

    tower_steps: int = 250
    tower_batch: int = 96
    tower_learning_rate: float = 3e-3
    steps: int = 400
    batch: int = 48
    learning_rate: float = 2e-3
    exact_share: float = 0.6
    facts_share: float = 0.25
    hidden_share: float = 0.0
    warmup_steps: int = 20
    end_of_reply_weight: float = 0.05
    save_steps: int = 100
    logging_steps: int = 50


def train_supervised(
    world: World,
    output_dir: str | Path,
    *,
    model_seed: int = 0,
    data_seed: int = 0,
    settings: SupervisedSettings | None = None,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains the testbed's model from scratch and saves it with its processor as an ordinary Hugging Face folder.

    After a killed run the same call resumes from the last checkpoint (in `output_dir/training`) and ends with the
    same weights. A finished folder is returned at once. Several processes share each batch.

    Args:
        world: The world to learn; saved as `world.json`.
        output_dir: Gets the model, the processor, `world.json` and `supervised.json` (settings and log).
        model_seed: Seed of the weights.
        data_seed: Seed of pictures and texts.
        settings: Lengths and rates.
        progress: Whether to show progress bars.
        callbacks: Of both stages' trainers; in place of the printed log where `progress` is off.

    Returns:
        `output_dir`.

    Raises:
        ValueError: If the folder holds a model of another world, seed or setting.
    """
    settings = settings or SupervisedSettings()
    output_dir = Path(output_dir)
    recipe = {
        "world": dataclasses.asdict(world),
        "model_seed": model_seed,
        "data_seed": data_seed,
        "settings": dataclasses.asdict(settings),
    }
    if _holds(output_dir, recipe):
        return output_dir

    processor = build_processor(world.attributes)
    model = build_model(processor, model_seed)
    tower = train_tower(model, processor, world, output_dir, data_seed, settings, progress, callbacks)
    captions = train_captions(model, processor, world, output_dir, data_seed, settings, progress, callbacks)
    if PartialState().is_main_process:
        model.requires_grad_(True).save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
        world.save(output_dir)
        # Written last and atomically: if it exists, everything else does.
        summary = recipe | {"tower_log": tower, "log": captions}
        write_whole(output_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")
    PartialState().wait_for_everyone()
    return output_dir


def train_tower(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    world: World,
    output_dir: Path,
    data_seed: int,
    settings: SupervisedSettings,
    progress: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Stage 0, in place of CLIP's pre-training: image features become the embeddings of the words for the cells.

    Returns:
        The trainer's log.
    """
    names = [*world.kinds, NOTHING]
    ids = processor.tokenizer.convert_tokens_to_ids
    module = TowerTrainee(model, ids(names), [ids(words) for words in ATTRIBUTES] if world.attributes else [])
    arguments = _arguments(
        output_dir / "training" / "tower",
        settings,
        steps=settings.tower_steps,
        batch=settings.tower_batch,
        progress=progress,
        learning_rate=settings.tower_learning_rate,
        seed=data_seed,
    )
    stream = Stream(TowerPictures(world, data_seed), settings.tower_steps * settings.tower_batch)
    trainer = Trainer(module, arguments, train_dataset=stream, data_collator=TowerCollator(processor, names))
    return _train(trainer, callbacks)


def train_captions(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    world: World,
    output_dir: Path,
    data_seed: int,
    settings: SupervisedSettings,
    progress: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Supervised fine-tuning on captions and questions, exact and then biased; the tower is frozen.

    Returns:
        The trainer's log.
    """
    exact = round(settings.exact_share * settings.steps) * settings.batch
    keep_parameter_names(model)
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    arguments = _arguments(
        output_dir / "training" / "captions",
        settings,
        steps=settings.steps,
        batch=settings.batch,
        progress=progress,
        learning_rate=settings.learning_rate,
        adam_beta2=0.98,
        weight_decay=0.01,
        seed=data_seed,
    )
    examples = CaptionExamples(world, data_seed, exact, settings.facts_share, settings.hidden_share)
    stream = Stream(examples, settings.steps * settings.batch)
    trainer = CaptionTrainer(
        model,
        arguments,
        train_dataset=stream,
        data_collator=SupervisedCollator(processor),
        end_of_reply_weight=settings.end_of_reply_weight,
    )
    return _train(trainer, callbacks)


class TowerTrainee(nn.Module):
    """Vision tower and projector, taught to say which word belongs to each cell.

    loss = CE(8 f E^T / (d m)) + 0.3 mean((f - E_target)^2) / m, with features f (B, 9, d), frozen word embeddings
    E (words, d) and m = mean(E^2). The first term makes a feature point at its word, the second gives it the word's
    scale, so that a faint object ends up between words. With attributes, the target is the sum of all words for the
    cell, and the first term is one more cross-entropy for each attribute.

    Args:
        model: Its tower and projector are trained in place.
        words: Token ids of the kinds and of "nothing".
        attributes: Token ids of the words of each attribute.
    """

    embeddings: Tensor
    attribute_embeddings: Tensor

    def __init__(
        self, model: LlavaForConditionalGeneration, words: list[int], attributes: Sequence[Sequence[int]] = ()
    ):
        super().__init__()
        self.tower = model.model.get_submodule("vision_tower")
        self.projector = model.model.get_submodule("multi_modal_projector")
        table = cast(nn.Embedding, model.get_input_embeddings())
        embeddings = table.weight.detach()[words].clone()  # (words, d)
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.sizes = [len(ids) for ids in attributes]
        ids = [token for tokens in attributes for token in tokens]
        self.register_buffer("attribute_embeddings", table.weight.detach()[ids].clone(), persistent=False)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Image features as the language model gets them: (B, 3, 48, 48) -> (B, 9, d)."""
        return self.projector(self.tower(pixel_values).last_hidden_state[:, 1:])  # without the class token

    def forward(self, pixel_values: Tensor, cells: Tensor, attributes: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of a batch; `cells` (B, 9) index the words, `attributes` (B, 9, A) those of each attribute."""
        features = self.features(pixel_values)
        scale = self.embeddings.square().mean()
        factor = 8 / (self.embeddings.shape[1] * scale)
        logits = features @ self.embeddings.T * factor  # (B, 9, words)
        loss, target = F.cross_entropy(logits.flatten(0, 1), cells.flatten()), self.embeddings[cells]
        if attributes is not None:
            tables = self.attribute_embeddings.split(self.sizes)
            for table, which in zip(tables, attributes.unbind(-1), strict=True):  # (words, d), (B, 9)
                logits = features @ table.T * factor
                loss = loss + F.cross_entropy(logits.flatten(0, 1), which.flatten())  # -100 counts for nothing
                target = target + table[which.clamp(min=0)] * (which >= 0).unsqueeze(-1)
        distance = (features - target).square().mean() / scale
        return {"loss": loss + 0.3 * distance}


class CaptionTrainer(Trainer):
    """Adds up the mean losses of captions and of answers, so that five words in one reply do not outweigh one answer.

    loss = mean NLL(yes / no) + mean NLL(caption tokens) + w * (NLL(end tokens) per answer)
    """

    def __init__(self, *args: Any, end_of_reply_weight: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.end_of_reply_weight = end_of_reply_weight
        self.parts: dict[str, list[float]] = {"caption_loss": [], "question_loss": []}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch of `SupervisedCollator`."""
        captions, spoken = self._token_losses(model, inputs, "captions")
        questions, asked = self._token_losses(model, inputs, "questions")
        config = cast(LlavaForConditionalGeneration, self.model).config  # `model` may be wrapped
        ends = asked == config.get_text_config().eos_token_id
        answers = (asked != -100) & ~ends
        caption_loss = captions.sum() / (spoken != -100).sum()
        question_loss = questions[answers].mean()
        self.parts["caption_loss"].append(caption_loss.item())
        self.parts["question_loss"].append(question_loss.item())
        end_loss = questions[ends].sum() / answers.sum()
        loss = caption_loss + question_loss + self.end_of_reply_weight * end_loss
        return (loss, None) if return_outputs else loss

    @staticmethod
    def _token_losses(model: nn.Module, inputs: dict[str, Any], which: str) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood per token, zero where there is no label, and the labels: both (B, T-1)."""
        read = {name: value for name, value in inputs[which].items() if name != "labels"}
        logits = model(**read, pixel_values=inputs["pixel_values"]).logits[:, :-1]
        labels = inputs[which]["labels"][:, 1:]
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss, averaged since the last log line."""
        means = {name: round(float(np.mean(values)), 4) for name, values in self.parts.items() if values}
        self.parts = {name: [] for name in self.parts}
        super().log(logs | means, *args, **kwargs)


def _arguments(
    folder: Path, settings: SupervisedSettings, *, steps: int, batch: int, progress: bool, **extra: Any
) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch % processes:
        raise ValueError(f"A batch of {batch} pictures does not divide over {processes} processes; change the batch.")
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch // processes,
        train_sampling_strategy="sequential",  # the stream is in order: its first part is exact, the rest biased
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": max(1, steps - settings.warmup_steps),
            "min_lr_ratio": 0.03,
            "decay_type": "linear",
        },
        warmup_steps=min(settings.warmup_steps, steps - 1),
        max_grad_norm=1.0,
        logging_steps=settings.logging_steps,
        save_steps=settings.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not progress,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=int(cores() > processes),  # a core that nothing else uses draws the pictures
        **extra,
    )


def _train(trainer: Trainer, callbacks: Sequence[TrainerCallback]) -> list[dict[str, float]]:
    if callbacks:
        trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(trainer.args.output_dir)))
    return trainer.state.log_history


def _holds(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether a folder holds the finished model of this recipe."""
    if not (folder / SUMMARY).exists():
        return False
    # Through JSON, where a tuple becomes a list.
    wanted, found = json.loads(json.dumps(recipe)), json.loads((folder / SUMMARY).read_text())
    # A folder that was made before an option came in has its default.
    for name, options in (("world", World), ("settings", SupervisedSettings)):
        found[name] = json.loads(json.dumps(dataclasses.asdict(options()))) | found[name]
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        raise ValueError(
            f"{folder} holds a finished model that differs in {', '.join(different)}. Choose another folder, or "
            "delete this one to train again."
        )
    return True
