"""Plain samples of the policy by vLLM, for sources of pairs: a server, or an engine beside the trainer, as in TRL."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, cast

import torch
import trl
from accelerate import Accelerator, PartialState
from PIL.Image import Image
from transformers import ProcessorMixin
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from trl_vlm.data.encoding import prompt_ids
from trl_vlm.data.images import MAX_IMAGE_PIXELS
from trl_vlm.models.downloads import fetch_weights, once_per_node
from trl_vlm.models.generation import Reply, SampledElsewhere, ends_of_reply, plain_sampling, reply_of
from trl_vlm.models.loading import base_of, load_generative_processor, model_without_weights
from trl_vlm.pairs.source import PairSource, images_of
from trl_vlm.pairs.vllm import VLLMOptions, VLLMSampling, check_options
from trl_vlm.trainers.types import Model, base_model

logger = logging.getLogger(__name__)

# Requests to a server at once; it batches them itself.
REQUESTS = 64


def check_vllm(options: VLLMSampling, source: PairSource | type[Any] | None) -> None:
    """Refuses vLLM where nothing would use it, and where it is not installed.

    Raises:
        ValueError: No source samples plainly, or the mode is unknown.
        ImportError: vLLM is not installed.
    """
    if not options.use_vllm:
        return
    check_options(options, source)
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm` needs vLLM, which is not installed (or not in a version that TRL supports). Install it with "
            "`pip install 'trl[vllm]'`, or unset `use_vllm`: transformers then generates."
        )


class VLLMSampler:
    """Plain samples by vLLM: a `ReplyEngine`.

    Every reply is a request with a seed of its own, so that it does not depend on what is sampled beside it, and no
    process waits for another one's rows.

    Args:
        processor: The policy's.
        ends: Tokens that end a reply.
        sampler: The client of a server, or TRL's holder of an engine in this process.
    """

    def __init__(self, processor: ProcessorMixin, ends: Sequence[int], sampler: VLLMClient | VLLMGeneration):
        self.processing_class, self._ends, self._sampler = processor, ends, sampler

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
        processor = self.processing_class
        once = {id(row): (row, name) for row, name in zip(rows, names, strict=True)}
        images = {key: images_of(row, name, MAX_IMAGE_PIXELS) for key, (row, name) in once.items()}
        prompts = {key: prompt_ids(processor, row["prompt"], images[key], name) for key, (row, name) in once.items()}
        # What a server may take from a checkpoint is set, too.
        plain = {**plain_sampling(temperature), "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": max_new_tokens}
        made = self._sampled(
            [prompts[id(row)] for row in rows],
            [images[id(row)] for row in rows],
            [{**plain, "seed": seed} for seed in seeds],
        )
        return [reply_of(tokens, self._ends, processor) for tokens in made]

    def _sampled(
        self, prompts: Sequence[list[int]], images: Sequence[list[Image]], settings: Sequence[dict[str, Any]]
    ) -> list[list[int]]:
        """New tokens of each prompt."""
        if isinstance(self._sampler, VLLMGeneration):
            return _from_engine(self._sampler, prompts, images, settings)
        return self._from_server(self._sampler, prompts, images, settings)

    def _from_server(
        self,
        client: VLLMClient,
        prompts: Sequence[list[int]],
        images: Sequence[list[Image]],
        settings: Sequence[dict[str, Any]],
    ) -> list[list[int]]:
        """New tokens of each prompt; the server processes the images of a row once."""
        once = {id(row): row for row in images}
        features = dict(zip(once, client.image_features([row or None for row in once.values()]), strict=True))

        def send(place: int) -> list[int]:
            # TRL's method reads the processor of its object, which is here under the same name.
            owner = cast(VLLMGeneration, self)
            given = VLLMGeneration._place_features(owner, features[id(images[place])], prompts[place])
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


class VLLMReplies(VLLMSampler):
    """Plain samples of a trainer's policy by vLLM. Weights go there as in TRL's trainers, once per step.

    Args:
        trainer: Of the policy, ours or TRL's. Its constructor has run.
        options: Where vLLM samples.
    """

    def __init__(self, trainer: trl.DPOTrainer, options: VLLMOptions):
        model, processor = cast(Model, trainer.model), cast(ProcessorMixin, trainer.processing_class)
        self._generation = VLLMGeneration(
            model=model,
            accelerator=trainer.accelerator,
            processing_class=processor,
            group_port=options.vllm_group_port,
            trust_remote_code=cast(trl.DPOConfig, trainer.args).trust_remote_code,
            **_of_engine(options),
        )
        sampler: VLLMClient | VLLMGeneration = self._generation
        if options.vllm_mode == "server":
            # TRL makes a client on the first process alone, which asks for all; here each process asks for its rows.
            is_first = trainer.accelerator.is_main_process
            sampler = self._generation.vllm_client if is_first else _client_of(options)
        super().__init__(processor, ends_of_reply(base_model(model), processor), sampler)
        self._step = -1

    def sync(self, step: int) -> None:
        """Gives vLLM the policy's weights, unless it has those of this step; all processes call it together."""
        if step != self._step:
            self._generation.sync_weights()
            self._step = step


def policy_by_vllm(path: str, options: VLLMSampling) -> SampledElsewhere:
    """A policy of which vLLM has the weights, and this process none: plain samples are all that it can do.

    A server has the model already, and nothing is sent to it; an engine loads it. Every process must come here.

    Args:
        path: Folder or hub id of a model with all weights.
        options: Where vLLM samples.

    Raises:
        ValueError: It is an adapter.
        ConnectionError: No server answers.
    """
    client = _client_of(options) if options.vllm_mode == "server" else None
    if client is not None and client.model != path and PartialState().is_main_process:
        logger.warning(
            "The vLLM server has %r, and `--model` is %r. Prompts are made by the processor of the latter; if these "
            "are not two names of one model, stop here.",
            client.model,
            path,
        )
    with once_per_node():
        base = base_of(path)
    if base is not None:
        raise ValueError(
            f"{path!r} is an adapter, and vLLM samples from a model with all weights. Merge it (`trl-vlm merge {path} "
            "MERGED`) and give the merged folder, or leave vLLM out."
        )
    with once_per_node():
        model, processor = model_without_weights(path), load_generative_processor(path)
    sampler: VLLMClient | VLLMGeneration | None = client
    if sampler is None:
        fetch_weights({path: {}})
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        sampler = VLLMGeneration(model, accelerator, processor, **_of_engine(options))
    return SampledElsewhere(model, processor, VLLMSampler(processor, ends_of_reply(model, processor), sampler))


def _from_engine(
    generation: VLLMGeneration,
    prompts: Sequence[list[int]],
    images: Sequence[list[Image]],
    settings: Sequence[dict[str, Any]],
) -> list[list[int]]:
    """New tokens of each prompt, from the engine of this process."""
    sampling_parameters = import_module("vllm").SamplingParams  # not installed everywhere
    inputs: list[dict[str, Any]] = [{"prompt_token_ids": ids} for ids in prompts]
    for given, row in zip(inputs, images, strict=True):
        if row:
            given["multi_modal_data"] = {"image": row if len(row) > 1 else row[0]}
    parameters = [sampling_parameters(n=1, **options) for options in settings]
    outputs = generation.llm.generate(inputs, sampling_params=parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _of_engine(options: VLLMSampling) -> dict[str, Any]:
    """Arguments of `VLLMGeneration` that say where vLLM samples."""
    return {
        "mode": options.vllm_mode,
        "server_base_url": options.vllm_server_base_url,
        "server_host": options.vllm_server_host,
        "server_port": options.vllm_server_port,
        "server_timeout": options.vllm_server_timeout,
        "gpu_memory_utilization": options.vllm_gpu_memory_utilization,
        "max_model_length": options.vllm_max_model_length,
        "model_impl": options.vllm_model_impl,
    }


def _client_of(options: VLLMSampling) -> VLLMClient:
    base_url = options.vllm_server_base_url or f"http://{options.vllm_server_host}:{options.vllm_server_port}"
    return VLLMClient(base_url=base_url, connection_timeout=options.vllm_server_timeout)
