"""Plain samples of the policy by vLLM, for sources of pairs: a server, or an engine beside the trainer, as in TRL."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import trl
from PIL.Image import Image
from transformers import ProcessorMixin
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from trl_vlm.data.encoding import prompt_ids
from trl_vlm.data.images import MAX_IMAGE_PIXELS
from trl_vlm.models.generation import Reply, ends_of_reply, reply_of
from trl_vlm.pairs.source import PairSource, images_of
from trl_vlm.trainers.types import base_model

if TYPE_CHECKING:
    from trl_vlm.trainers.dpo.trainer import DPOTrainer

# Requests to a server at once; it batches them itself.
REQUESTS = 64
MODES = ("colocate", "server")


def _as_in_grpo(name: str) -> Any:
    """The default and the help of a field of TRL's `GRPOConfig`."""
    given = cast(Field, trl.GRPOConfig.__dataclass_fields__[name])
    return field(default=given.default, metadata=dict(given.metadata))


@dataclass
class VLLMOptions:
    """Options of vLLM, named as in TRL's `GRPOConfig`."""

    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Sample the replies of `pair_source` with vLLM, which must be installed. For sources of plain "
            "samples (`SelfSamples`, `Judged`, and mixtures with them)."
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "'colocate': an engine on each training GPU. 'server': one that `vllm serve` has started on other "
            "GPUs.",
            "choices": list(MODES),
        },
    )
    vllm_server_base_url: str | None = _as_in_grpo("vllm_server_base_url")
    vllm_server_host: str = _as_in_grpo("vllm_server_host")
    vllm_server_port: int = _as_in_grpo("vllm_server_port")
    vllm_server_timeout: float = _as_in_grpo("vllm_server_timeout")
    vllm_group_port: int = _as_in_grpo("vllm_group_port")
    vllm_gpu_memory_utilization: float = _as_in_grpo("vllm_gpu_memory_utilization")
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={"help": "'colocate': most tokens of a prompt and its reply; unset, the model's own limit."},
    )
    vllm_model_impl: str = _as_in_grpo("vllm_model_impl")


def check_vllm(args: VLLMOptions, source: PairSource | None) -> None:
    """Refuses vLLM where nothing would use it, and where it is not installed.

    Raises:
        ValueError: No source samples plainly, or the mode is unknown.
        ImportError: vLLM is not installed.
    """
    if not args.use_vllm:
        return
    if args.vllm_mode not in MODES:
        raise ValueError(f"`vllm_mode` is {args.vllm_mode!r}; it must be one of {', '.join(MODES)}.")
    if not getattr(source, "samples_elsewhere", False):
        what = "there is no `pair_source`" if source is None else f"{source!r} takes no samples from it"
        raise ValueError(
            f"`use_vllm` has no effect: {what}. It draws plain samples, for `SelfSamples` and `Judged`; BDHS hides "
            "images from attention and POVID reads logits, which vLLM cannot do. Unset it."
        )
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm` needs vLLM, which is not installed (or not in a version that TRL supports). Install it with "
            "`pip install 'trl[vllm]'`, or unset `use_vllm`: transformers then generates."
        )


class VLLMReplies:
    """Plain samples of a trainer's policy by vLLM: a `ReplyEngine`.

    Weights go to vLLM as in TRL's trainers, once per step. Every reply is a request with a seed of its own, so that it
    does not depend on what is sampled beside it, and no process waits for another one's rows.

    Args:
        trainer: Of the policy. Its constructor has run.
    """

    def __init__(self, trainer: "DPOTrainer"):
        args, self._processor = trainer.args, cast(ProcessorMixin, trainer.processing_class)
        self._ends = ends_of_reply(base_model(trainer.model), self._processor)
        self._generation = VLLMGeneration(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=self._processor,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
        )
        self._client: VLLMClient | None = None
        if args.vllm_mode == "server":
            # TRL makes a client on the first process alone, which asks for all; here each process asks for its rows.
            self._client = self._generation.vllm_client if trainer.accelerator.is_main_process else _client_of(args)
        self._step = -1

    def sync(self, step: int) -> None:
        """Gives vLLM the policy's weights, unless it has those of this step; all processes call it together."""
        if step != self._step:
            self._generation.sync_weights()
            self._step = step

    def replies(
        self,
        rows: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        *,
        seeds: Sequence[int],
        temperature: float,
        max_new_tokens: int,
    ) -> list[Reply]:
        """A plain sample for each row, as `ReplyEngine` says."""
        once = {id(row): (row, name) for row, name in zip(rows, names, strict=True)}
        images = {key: images_of(row, name, MAX_IMAGE_PIXELS) for key, (row, name) in once.items()}
        prompts = {
            key: prompt_ids(self._processor, row["prompt"], images[key], name) for key, (row, name) in once.items()
        }
        # All that a checkpoint may set for generation is set here.
        plain = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        sample = self._from_engine if self._client is None else self._from_server
        made = sample(
            [prompts[id(row)] for row in rows],
            [images[id(row)] for row in rows],
            [{**plain, "max_tokens": max_new_tokens, "seed": seed} for seed in seeds],
        )
        return [reply_of(tokens, self._ends, self._processor) for tokens in made]

    def _from_server(
        self, prompts: Sequence[list[int]], images: Sequence[list[Image]], settings: Sequence[dict[str, Any]]
    ) -> list[list[int]]:
        """New tokens of each prompt; the server processes the images of a row once."""
        client = cast(VLLMClient, self._client)
        once = {id(row): row for row in images}
        features = dict(zip(once, client.image_features([row or None for row in once.values()]), strict=True))

        def send(place: int) -> list[int]:
            given = self._generation._place_features(features[id(images[place])], prompts[place])
            options = dict(settings[place])
            made = client.generate(
                [prompts[place]],
                features=None if given is None else [given],
                logprobs=None,
                generation_kwargs={"seed": options.pop("seed")},
                **options,
            )
            return made["completion_ids"][0]

        with ThreadPoolExecutor(max_workers=REQUESTS) as executor:
            return list(executor.map(send, range(len(prompts))))

    def _from_engine(
        self, prompts: Sequence[list[int]], images: Sequence[list[Image]], settings: Sequence[dict[str, Any]]
    ) -> list[list[int]]:
        """New tokens of each prompt, from the engine of this process."""
        sampling_parameters = import_module("vllm").SamplingParams  # not installed everywhere
        inputs: list[dict[str, Any]] = [{"prompt_token_ids": ids} for ids in prompts]
        for given, row in zip(inputs, images, strict=True):
            if row:
                given["multi_modal_data"] = {"image": row if len(row) > 1 else row[0]}
        parameters = [sampling_parameters(n=1, **options) for options in settings]
        outputs = self._generation.llm.generate(inputs, sampling_params=parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def _client_of(args: VLLMOptions) -> VLLMClient:
    base_url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    return VLLMClient(base_url=base_url, connection_timeout=args.vllm_server_timeout)
