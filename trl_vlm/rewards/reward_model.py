"""The image-and-facts reward model as a TRL reward function, for PPO and for TRL's own GRPO and RLOO."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from trl_vlm.data.encoding import encode
from trl_vlm.data.facts import JUDGE_TEMPLATE_FILE, JudgeTemplate, judge_messages
from trl_vlm.data.messages import Conversation, reply_text
from trl_vlm.models._transformers import adapter_state, hub_arguments
from trl_vlm.models.families import is_image_input
from trl_vlm.models.generation import evaluating, forked_generators
from trl_vlm.models.loading import base_of, moved
from trl_vlm.models.prefix_sharing.groups import common_prefixes, share_rows
from trl_vlm.models.prefix_sharing.sharing import PLAIN_IMAGES, awaits_trial, share_prefix, why_pairs_not_shareable
from trl_vlm.models.processors import control_tokens, load_processor
from trl_vlm.models.reward_model import HEAD_KEY, RewardOutput, load_reward_model
from trl_vlm.models.unsharded import is_sharded, unsharded_loading
from trl_vlm.rewards.checks import finite_rewards
from trl_vlm.rewards.rows import JudgedRow, judged_rows


class Scorer(Protocol):
    """What scores in the place of a loaded reward model."""

    def __call__(self, **inputs: torch.Tensor) -> RewardOutput:
        """Reads rows; `logits` (B, 1) are their scores."""
        ...

    def parameters(self) -> Iterable[torch.Tensor]:
        """Its own parameters, on the device that it reads from."""
        ...


class _Judged(NamedTuple):
    """What the reward model reads of one row.

    Attributes:
        messages: Prompt, reply and judge turn.
        images: In the order of their placeholders.
        prompt: The messages before the reply.
    """

    messages: Conversation
    images: list[object]
    prompt: Conversation

    def begins_like(self, other: "_Judged") -> bool:
        """Whether prompt and images are the same."""
        return (
            self.prompt == other.prompt
            and len(self.images) == len(other.images)
            and all(_is_same_image(*images) for images in zip(self.images, other.images, strict=True))
        )


class RewardModelReward:
    """Scores replies with a reward model that sees the images and, in its judge turn, the facts.

    A TRL reward function: pass it to `reward_funcs` of `PPOTrainer`, `trl.GRPOTrainer` or `trl.RLOOTrainer`. It reads
    the dataset columns `images` (or `image`) and `facts`; rows may lack either. The policy never sees the facts.

    Each process holds the whole model, frozen, on its own device; under ZeRO-3 and FSDP too. Facts are shown in the
    order of the row, so scores are deterministic. Control tokens (image placeholders, ends of turns) are removed from
    the text of a reply, so that a reply can neither break the input nor end its turn and judge itself. An empty reply
    is scored like any other, or gets `empty_reply_score`. Replies to one prompt that follow each other, as they do in
    rollouts with several replies per prompt, share one pass through it and its images.

    Args:
        model: Folder or hub id of a reward model (or of a PEFT adapter of one), as `RewardTrainer` saves it; or a
            loaded one. Its folder also holds the processor and the judge template.
        processor: The reward model's processor, if not the one in its folder.
        template: The judge template, if not the one in its folder. `JudgeTemplate.none()` for a reward model from
            elsewhere that reads plain conversations.
        name: The name under which TRL logs the reward.
        batch_size: Replies scored at once.
        max_length: A longer input, judge turn included, is an error that names the row; nothing is ever cut off.
        empty_reply_score: Score of a reply without a visible character; None lets the model score it.
        device: Where to score, if not on the device of this process.
        share_prefix: Compute prompt and images once for replies that follow each other and have them in common, for
            families for which that is tested to give the same scores.
        load_options: For a folder or hub id, as for `from_pretrained`: `dtype`, `quantization_config`, `revision`, ...

    Source: Fact-RLHF (arXiv:2309.14525).
    Differs: its code shuffles the facts at every use, and tokenizes the judge turn separately from the reply.

    Example:
        >>> reward = RewardModelReward("reward-model")
        >>> trainer = GRPOTrainer(model="policy", reward_funcs=reward, train_dataset=rows_with_images_and_facts)
    """

    def __init__(
        self,
        model: str | PathLike | PreTrainedModel,
        processor: ProcessorMixin | None = None,
        template: JudgeTemplate | None = None,
        *,
        name: str = "reward_model",
        batch_size: int = 16,
        max_length: int | None = None,
        empty_reply_score: float | None = None,
        device: torch.device | str | None = None,
        share_prefix: bool = True,
        **load_options: Any,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; score at least 1 reply at once.")
        if not isinstance(model, str | PathLike) and load_options:
            raise TypeError(
                f"{sorted(load_options)} are options of loading, but `model` is loaded already. Leave them out."
            )
        self.__name__ = name
        self.batch_size = batch_size
        self.max_length = max_length
        self.empty_reply_score = empty_reply_score
        self.device = torch.device(device) if device is not None else None
        self.share_prefix = share_prefix
        source = str(model if isinstance(model, str | PathLike) else model.name_or_path or "")
        hub = hub_arguments(load_options)
        self.template = template if template is not None else load_template(source, **hub)
        self.processor = processor if processor is not None else _load_processor(source, hub)
        self._control_tokens = control_tokens(self.processor)
        self._model: PreTrainedModel | Scorer | None = None
        self._ready: Callable[[], AbstractContextManager[None]] = self._on_its_device
        self.unloaded_adapter: tuple[str, dict[str, Any]] | None = None
        if not isinstance(model, str | PathLike):
            self._model = model
            if is_sharded(model):
                raise ValueError(
                    "the reward model's parameters are split among the processes (ZeRO-3), so it cannot score on "
                    "its own. Pass its folder: `RewardModelReward` then loads it whole."
                )
        elif _brings_head(source, hub):
            # Loaded when it first scores: a trainer whose policy has the same base gives it a role there before.
            self.unloaded_adapter = (str(model), load_options)
        else:
            self._model = self._load(model, load_options)

    @property
    def model(self) -> "PreTrainedModel | Scorer":
        """What scores: the reward model, or its role on the policy's base."""
        if self._model is None:
            assert self.unloaded_adapter is not None
            with forked_generators(torch.get_default_device()):  # an adapter is drawn before its weights are read
                self._model = self._load(*self.unloaded_adapter)
            self.unloaded_adapter = None
        return self._model

    def use_role(self, role: "Scorer", ready: Callable[[], AbstractContextManager[None]]) -> None:
        """Scores with a role on a base that somebody else holds.

        Args:
            role: Returns `logits` (B, 1), as a reward model does.
            ready: Makes a context in which the role is in evaluation mode and makes no gradient.
        """
        self._model, self._ready, self.unloaded_adapter = role, ready, None

    def _load(self, path: str | PathLike, options: dict[str, Any]) -> PreTrainedModel:
        if "quantization_config" in options and "device_map" not in options:
            # A quantized model cannot be moved later; by default it would go to the first GPU on every process.
            device = self.device if self.device is not None else PartialState().device
            if device is not None and device.type != "cpu":
                options = {**options, "device_map": {"": device}}
        with unsharded_loading():
            return load_reward_model(path, for_scoring=True, **options).eval().requires_grad_(False)

    def __call__(
        self,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation],
        completion_ids: Sequence[Sequence[int]] | None = None,
        images: Sequence[Sequence[object] | None] | None = None,
        image: Sequence[object] | None = None,
        facts: Sequence[Sequence[str] | None] | None = None,
        row_name: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float]:
        """The score of each reply.

        Args:
            prompts: Conversations up to the reply; their contents are strings, or blocks with the images in them.
            completions: The replies, each a list of messages.
            completion_ids: Not read: the reply is tokenized in the reward model's own way.
            images: Images of each row, for prompts that do not hold them.
            image: The one image of each row, instead of `images`.
            facts: Facts of each row; None or [] for a row without.
            row_name: What errors call the rows.
            columns: Not read.

        Raises:
            ValueError: If a row's images do not match its placeholders, an image is broken, or a score is not finite.
            TypeError: If prompts, replies or facts have the wrong form.
        """
        rows = judged_rows(prompts, completions, images=images, image=image, facts=facts, row_name=row_name)
        places = [f"{row.name} of the rollout" if row_name is None else row.name for row in rows]
        inputs = [self._input(row) for row in rows]
        scores: list[float] = []
        model = self.model
        with self._ready():
            for start in range(0, len(rows), self.batch_size):
                batch = slice(start, start + self.batch_size)
                scores += self._scores(model, inputs[batch], places[batch])
        if self.empty_reply_score is not None:
            scores = [
                score if reply_text(completion).strip() else self.empty_reply_score
                for score, completion in zip(scores, completions, strict=True)
            ]
        return cast(list[float], finite_rewards(scores, self.__name__, completions, row_name))  # none is None

    def _input(self, row: JudgedRow) -> _Judged:
        """What the reward model reads of one row."""
        messages = judge_messages(
            row.prompt, row.completion, row.facts, self.template, control_tokens=self._control_tokens
        )
        return _Judged(messages, row.images, row.prompt)

    def _scores(
        self,
        model: "PreTrainedModel | Scorer",
        inputs: Sequence[_Judged],
        names: Sequence[str],
    ) -> list[float]:
        batch: dict[str, Any] = self._encoded(inputs, names)
        if self.share_prefix and _shares_prefix(model):
            batch = self._with_prompts_once(batch, inputs, names)
        device = next(iter(model.parameters())).device
        logits = model(**send_to_device(batch, device)).logits  # (B, 1)
        assert logits is not None  # a reward model always returns them
        return logits[:, 0].float().tolist()

    def _encoded(self, inputs: Sequence[_Judged], names: Sequence[str]) -> dict[str, torch.Tensor]:
        return encode(
            self.processor,
            [row.messages for row in inputs],
            [row.images for row in inputs],
            continue_final_message=bool(self.template.opening),
            max_length=self.max_length,
            names=names,
        )

    def _with_prompts_once(
        self, batch: dict[str, Any], inputs: Sequence[_Judged], names: Sequence[str]
    ) -> dict[str, Any]:
        """The encoded rows with the images of each prompt once."""
        firsts = _first_that_begins_alike(inputs)
        places = sorted(set(firsts))
        if len(places) == len(firsts):
            return batch
        shared_prefix = common_prefixes(batch["input_ids"], batch["attention_mask"], firsts)
        plain = {name: value for name, value in batch.items() if is_image_input(name)}
        once = self._encoded([inputs[place] for place in places], [names[place] for place in places]) if plain else {}
        return {**share_rows(batch, shared_prefix, once), PLAIN_IMAGES: plain}

    @contextmanager
    def _on_its_device(self) -> Iterator[None]:
        """The model on this process's device, in evaluation mode, without gradient; then in the modes it was in."""
        model = cast(PreTrainedModel, self.model)  # a role brings a context of its own
        # transformers sets `hf_device_map` on models that it placed itself, quantized ones among them.
        if getattr(model, "hf_device_map", None) is None:
            moved(model, self.device if self.device is not None else PartialState().device)
        with evaluating(model):
            yield


def reward_models_in(reward_func: object) -> list[RewardModelReward]:
    """The reward models that score in a reward function: itself, or inside our wrappers and compositions."""
    if isinstance(reward_func, RewardModelReward):
        return [reward_func]
    if isinstance(reward_func, partial):
        return reward_models_in(reward_func.func)
    if isinstance(reward_func, torch.nn.Module | type) or not hasattr(reward_func, "__dict__"):
        return []
    # `checked` and `normalized` set `__wrapped__`, as functools does; `FactRLHFReward` holds a `reward_model`.
    inner = [vars(reward_func).get(name) for name in ("__wrapped__", "reward_model")]
    return [found for part in inner for found in reward_models_in(part)]


def _first_that_begins_alike(inputs: Sequence[_Judged]) -> list[int]:
    """For each row the place of the first one of the rows before it, without a gap, that begin like it; or its own."""
    firsts: list[int] = []
    for place, row in enumerate(inputs):
        firsts.append(firsts[-1] if place and row.begins_like(inputs[place - 1]) else place)
    return firsts


def _is_same_image(one: object, other: object) -> bool:
    """Whether two images are known to be the same: the same object, place or bytes, or the same picture."""
    return one is other or (isinstance(one, str | PathLike | dict | Image.Image) and one == other)


def _shares_prefix(model: "PreTrainedModel | Scorer") -> bool:
    """Whether a reward model reads shared prefixes; if it can, it does from now on."""
    # PEFT's wrapper and a role both have this method; their classes are not imported for models that lack adapters.
    inside = getattr(model, "get_base_model", None)
    base = model if inside is None else inside()
    if not isinstance(base, PreTrainedModel) or why_pairs_not_shareable(base.config) is not None:
        return False
    share_prefix(base)
    # All processes come to a trial together, and here each has the rows that it has.
    return not awaits_trial(base) or PartialState().num_processes == 1


def _brings_head(source: str, hub: dict[str, Any]) -> bool:
    """Whether a folder or hub id is an adapter that holds its own head."""
    if base_of(source, **hub) is None:
        return False
    place = Path(source, hub.get("subfolder") or "")
    if place.is_dir():
        source, hub = str(place), {name: value for name, value in hub.items() if name != "subfolder"}
    return HEAD_KEY in adapter_state(source, **hub)


def load_template(source: str, **hub: Any) -> JudgeTemplate:
    """The judge template beside a reward model.

    Args:
        source: The model's folder or hub id.
        hub: Where files come from (`revision`, `subfolder`, ...).

    Raises:
        ValueError: There is no source.
        FileNotFoundError: There is no template.
    """
    if source and not Path(source).exists():
        file = cached_file(source, JUDGE_TEMPLATE_FILE, _raise_exceptions_for_missing_entries=False, **hub)
        if file is not None:
            return JudgeTemplate.from_pretrained(file)
    if not source:
        raise ValueError(
            "the reward model was not loaded from a folder, so its judge template is unknown. Pass `template`: the "
            "one that it was trained with, or `JudgeTemplate.none()` for the plain conversation."
        )
    return JudgeTemplate.from_pretrained(Path(source, hub.get("subfolder") or ""))


def _load_processor(source: str, hub: dict[str, Any]) -> ProcessorMixin:
    if not source:
        raise ValueError("the reward model was not loaded from a folder. Pass its `processor` too.")
    return load_processor(source, **hub)
