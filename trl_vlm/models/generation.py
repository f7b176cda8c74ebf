"""The one loop that samples replies, and what "plain sampling" means in this package.

Plain sampling is sampling from the model itself, softmax(logits / temperature), or greedy decoding. Of the
checkpoint's `generation_config` only the special tokens are used: those that end a reply and the padding token.
Everything else (`repetition_penalty`, `top_k`, `top_p`, `min_p`, `temperature`, `num_beams`, `min_new_tokens`, forced
and suppressed tokens, ...) is reset: otherwise the replies of two checkpoints could not be compared, and samples would
come from another distribution than the one whose log-probabilities are trained.

Judges, evaluation, pair sources, the degeneration check of the DPO trainer and the testbed all use `generated`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.generation import GenerateDecoderOnlyOutput

from trl_vlm.models.downloads import fetch_weights, once_per_node
from trl_vlm.models.loading import is_adapted, load_generative_model, load_generative_processor, moved
from trl_vlm.models.unsharded import unsharded_loading


class _Generative(Protocol):
    """A model with a language head."""

    def generate(self, **inputs: object) -> Tensor:
        """Prompts and their continuations, (B, T)."""
        ...


class Policy(NamedTuple):
    """A model that makes replies, and its processor (a tokenizer, if it reads no images)."""

    model: PreTrainedModel
    processor: ProcessorMixin


def load_policy(path: str, dtype: str) -> Policy:
    """The model of a folder or hub id (all weights or an adapter), whole on this process's device, and its processor.

    It is downloaded once per node, so every process must come here.

    Args:
        path: The folder or hub id.
        dtype: Precision, as for `from_pretrained`.
    """
    fetch_weights({path: {}})
    with unsharded_loading():
        model = load_generative_model(path, dtype=dtype)
    with once_per_node():
        processor = load_generative_processor(path)
    return Policy(moved(model, PartialState().device).eval(), processor)


class Reply(NamedTuple):
    """What a model replied.

    tokens: Token ids, without the one that ends the reply.
    text: The tokens as text, without special tokens.
    is_finished: Whether the reply came to its end within the tokens that it was given.
    """

    tokens: list[int]
    text: str
    is_finished: bool


class ReplyEngine(Protocol):
    """What samples replies of a policy in the place of its `generate`: vLLM."""

    def replies(
        self,
        rows: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        *,
        seeds: Sequence[int],
        temperature: float,
        max_new_tokens: int,
    ) -> list[Reply]:
        """A plain sample for each row (a row may come several times), each with a seed of its own."""
        ...


class SampledElsewhere(Policy):
    """A policy whose plain samples come from an engine that holds the same weights.

    Args:
        model: As in `Policy`, for everything else.
        processor: As in `Policy`.
        engine: Draws the samples.
    """

    engine: ReplyEngine

    def __new__(cls, model: PreTrainedModel, processor: ProcessorMixin, engine: ReplyEngine) -> "SampledElsewhere":
        """A policy of two fields, as others are."""
        policy = super().__new__(cls, model, processor)
        policy.engine = engine
        return policy


class Sampler(Protocol):
    """Scores whose argmax is the next token: `trl_vlm.models.sampling.GumbelSampler`."""

    def __call__(self, input_ids: None, scores: Tensor, sequences: Sequence[int]) -> Tensor:
        """Scores (N, V) for the logits (N, V) of the sequences numbered `sequences`."""
        ...


def generated(
    policy: Policy,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    sampler: Sampler | None = None,
    synced_gpus: bool | None = None,
) -> list[Reply]:
    """One reply to each prompt: greedy, or plain samples; see the module's docstring.

    Args:
        policy: The model, in any mode; it is in evaluation mode while it generates.
        batches: What the processor made of the prompts, padded on the left, ending with the opening of the
            assistant's turn: `trl_vlm.data.encoding.prompt_batches`.
        max_new_tokens: Longest reply, in tokens.
        temperature: 0 is greedy decoding.
        seed: Of the samples, needed at temperatures above 0; torch's global generators are left as they were.
        sampler: Chooses the tokens instead; replies are numbered from 0 over all batches.
        synced_gpus: As for `generate`; False where processes generate apart from each other.

    Returns:
        The replies in the order of the prompts.

    Raises:
        ValueError: A batch is padded on the right, or the arguments contradict each other.
    """
    settings = {"temperature": temperature, "seed": seed, "sampler": sampler, "synced_gpus": synced_gpus}
    made = generated_batches(policy, batches, max_new_tokens=max_new_tokens, **settings)
    return [reply for replies in made for reply in replies]


def generated_batches(
    policy: Policy,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    sampler: Sampler | None = None,
    synced_gpus: bool | None = None,
) -> Iterator[list[Reply]]:
    """As `generated`, one list per batch as soon as it is there.

    Until the last one is taken, or the iterator is closed, the model stays in evaluation mode and makes no gradient.
    """
    if temperature < 0 or (temperature > 0) != (seed is not None) or (sampler is not None and seed is not None):
        raise ValueError(
            f"`temperature` is {temperature}, `seed` is {seed}, and there is {'a' if sampler else 'no'} `sampler`. "
            "Greedy decoding has neither temperature nor seed, samples have both, and a sampler has its own."
        )
    model = policy.model
    config = _plain_config(policy, max_new_tokens, temperature)
    count = 0
    with generating(model), _plain(model, config), _draws(model, seed):
        for batch in batches:
            inputs = _prompts(batch, model)
            sequences = range(count, count + len(batch["input_ids"]))
            count = sequences.stop
            output = cast(_Generative, model).generate(
                **inputs,
                generation_config=config,
                # Left out where unset: a model may come with a `generate` that sets it.
                **({} if synced_gpus is None else {"synced_gpus": synced_gpus}),
                **({} if sampler is None else {"logits_processor": _chosen_by(sampler, sequences)}),
            )
            new = output[:, batch["input_ids"].size(1) :].tolist()  # (B, tokens)
            yield [reply_of(tokens, config.eos_token_id or [], policy.processor) for tokens in new]


def first_token_log_probs(policy: Policy, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Tensor]:
    """Log-probabilities of each reply's first token, (B, V) in float32 on the CPU, a batch at a time.

    Args:
        policy: As for `generated`.
        batches: As for `generated`.

    Raises:
        ValueError: A batch is padded on the right.
    """
    model = policy.model
    config = _plain_config(policy, 1, 0.0)
    with generating(model), _plain(model, config):
        for batch in batches:
            output = cast(_Generative, model).generate(
                **_prompts(batch, model),
                generation_config=config,
                output_logits=True,
                return_dict_in_generate=True,
                synced_gpus=False,  # nobody waits for a process that asks about fewer claims
            )
            logits = cast(GenerateDecoderOnlyOutput, output).logits
            assert logits is not None  # asked for
            yield logits[0].float().log_softmax(-1).cpu()


def _prompts(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of prompts on the model's device."""
    if not batch["attention_mask"][:, -1].all():
        raise ValueError("Prompts to be continued must be padded on the left; encode with padding_side='left'.")
    return {name: value.to(model.device) for name, value in batch.items()}


def ends_of_reply(
    model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase | None = None
) -> list[int]:
    """Ids of the tokens that end a reply: those of the model's `generation_config`, or else its tokenizer's."""
    ends = model.generation_config.eos_token_id
    if ends is None and processor is not None:
        ends = _tokenizer(processor).eos_token_id
    if ends is None:
        return []
    return cast(list[int], list(ends) if isinstance(ends, list | tuple) else [ends])


def reply_of(tokens: Sequence[int], ends: Sequence[int], processor: ProcessorMixin | PreTrainedTokenizerBase) -> Reply:
    """The reply that new tokens are, up to the first of the tokens that end one."""
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    kept = list(tokens[:length])
    text = cast(str, processor.decode(kept, skip_special_tokens=True))
    return Reply(kept, text, is_finished=length < len(tokens))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode without gradients; afterwards each module is as it was.

    Evaluation mode also switches gradient checkpointing off, since transformers checkpoints in training mode alone.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """A context in which an unsharded model can generate: evaluation mode, key-value cache, no gradients.

    Afterwards every module is in the mode it was in, and the configuration is unchanged.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    # hasattr: few families still keep `use_cache` in the outer configuration; `Trainer` writes it there.
    before = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    for config, _ in before:
        config.use_cache = True
    try:
        with evaluating(model):
            yield
    finally:
        for config, use_cache in before:
            config.use_cache = use_cache


def _tokenizer(processor: ProcessorMixin | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def plain_sampling(temperature: float) -> dict[str, Any]:
    """The settings of softmax(logits / temperature), as transformers and vLLM call them."""
    # None would be replaced by transformers' defaults, among them top_k=50.
    return {"temperature": float(temperature), "top_k": 0, "top_p": 1.0}


def _plain_config(policy: Policy, max_new_tokens: int, temperature: float) -> GenerationConfig:
    given = policy.model.generation_config
    sampling = plain_sampling(temperature) if temperature else {}
    pad = given.pad_token_id
    return GenerationConfig(
        bos_token_id=given.bos_token_id,
        eos_token_id=ends_of_reply(policy.model, policy.processor) or None,
        pad_token_id=pad if pad is not None else _tokenizer(policy.processor).pad_token_id,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_beams=1,
        **sampling,
    )


@contextmanager
def _plain(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """A context with `config` as the model's own, from which `generate` takes what a passed one leaves open."""
    inner = cast(PreTrainedModel, model.get_base_model() if is_adapted(model) else model)
    given = inner.generation_config
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = given


@contextmanager
def _draws(model: PreTrainedModel, seed: int | None) -> Iterator[None]:
    """A context with seeded torch generators of the CPU and the model's device, restored afterwards."""
    device = torch.device(model.device)
    with nullcontext() if seed is None else forked_generators(device):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def forked_generators(device: torch.device) -> Iterator[None]:
    """A context that restores torch's generators of the CPU and of one device.

    `torch.random.fork_rng` without `devices` saves those of all devices, in every process, and warns.
    """
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            yield


def _chosen_by(sampler: Sampler, sequences: Sequence[int]) -> LogitsProcessorList:
    def chosen(input_ids: Tensor, scores: Tensor) -> Tensor:  # generate refuses processors with a third argument
        return sampler(None, scores, sequences)

    return LogitsProcessorList([chosen])
