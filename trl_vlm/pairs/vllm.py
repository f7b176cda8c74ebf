"""Options of vLLM for sources of plain samples, named as in TRL's `GRPOConfig`; without TRL, for the command line."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from trl_vlm.pairs.source import PairSource  # which imports torch

MODES = ("colocate", "server")


@dataclass
class VLLMSampling:
    """Where vLLM samples, for a policy that does not change."""

    # Fields that say where replies are sampled, and not which.
    not_about_answers: ClassVar[frozenset[str]] = frozenset(
        {
            "vllm_mode",
            "vllm_server_base_url",
            "vllm_server_host",
            "vllm_server_port",
            "vllm_server_timeout",
            "vllm_gpu_memory_utilization",
            "vllm_max_model_length",
            "vllm_model_impl",
        }
    )

    use_vllm: bool = field(
        default=False,
        metadata={"help": "Sample the replies with vLLM, which must be installed."},
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "'colocate': an engine on the GPU of each process. 'server': one that `vllm serve` has started.",
            "choices": MODES,
        },
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={"help": "Address of the server, such as http://localhost:8000; host and port are then ignored."},
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Host of the server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the server."})
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the server to be up, before that is an error."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.9,
        metadata={"help": "'colocate': share of a GPU's memory for the engine's weights, keys and values."},
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={"help": "'colocate': most tokens of a prompt and its reply; unset, the model's own limit."},
    )
    vllm_model_impl: str = field(
        default="vllm", metadata={"help": "'colocate': who implements the model, vllm or transformers."}
    )


@dataclass
class VLLMOptions(VLLMSampling):
    """Where vLLM samples for a trainer, whose weights it gets."""

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
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={"help": "'colocate': share of a GPU's memory for the engine's weights, keys and values."},
    )
    vllm_group_port: int = field(
        default=51216, metadata={"help": "Port over which weights go to the server; change it where it is taken."}
    )


def check_options(options: VLLMSampling, source: "PairSource | type[Any] | None") -> None:
    """Refuses options of vLLM that no source would follow.

    Raises:
        ValueError: No source samples plainly, or the mode is unknown.
    """
    if options.vllm_mode not in MODES:
        raise ValueError(f"`vllm_mode` is {options.vllm_mode!r}; it must be one of {', '.join(MODES)}.")
    if not getattr(source, "samples_elsewhere", False):
        what = "there is no `pair_source`" if source is None else f"{source!r} takes no samples from it"
        raise ValueError(
            f"`use_vllm` has no effect: {what}. It draws plain samples, for `SelfSamples` and `Judged`; BDHS hides "
            "images from attention and POVID reads logits, which vLLM cannot do. Unset it."
        )
