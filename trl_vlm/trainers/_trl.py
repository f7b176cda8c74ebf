"""Every private name of TRL that this package relies on, with the reason.

On a TRL that lacks one of them, importing a trainer says which name is missing and which versions are tested.
`tests/trainers/test_trl_seams.py` holds a contract for each.
"""

import logging
import operator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import trl
from packaging.version import Version

logger = logging.getLogger(__name__)

TESTED_VERSIONS = "1.16"


def warn_if_untested(version: str) -> None:
    """Warns about an untested release of TRL: names may exist and mean something else."""
    if ".".join(map(str, Version(version).release[:2])) not in TESTED_VERSIONS.split(", "):
        logger.warning(
            "trl_vlm was not tested with TRL %s (tested: %s). If numbers surprise you, run its "
            "`tests/trainers/test_trl_seams.py`, or install a tested release.",
            version,
            TESTED_VERSIONS,
        )


warn_if_untested(trl.__version__)


def require(module: str, name: str) -> Any:
    """The private `name` (dotted for a method) of a TRL `module`, or an ImportError that says what to install."""
    try:
        return operator.attrgetter(name)(import_module(module))
    except (ImportError, AttributeError) as error:
        raise ImportError(_needs(f"{module}.{name}")) from error


def _needs(name: str) -> str:
    return (
        f"trl_vlm needs `{name}`, which TRL {trl.__version__} does not have. trl_vlm supports TRL 1.16 "
        f"and later 1.x (tested: {TESTED_VERSIONS}). Run `pip install 'trl>=1.16,<2'`."
    )


# Rollouts turn checkpointing off, as TRL does around its own log-probability passes.
disable_gradient_checkpointing = require("trl.models.utils", "disable_gradient_checkpointing")
# A reference model that the user passes is wrapped for the backend as TRL wraps the ones that it makes.
prepare_deepspeed = require("trl.models", "prepare_deepspeed")
prepare_fsdp = require("trl.models", "prepare_fsdp")
# Gives such a reference model the `log_probs` that TRL reads.
add_fused_lm_head = require("trl.trainer.utils", "add_fused_lm_head")

# What PPO overrides: it reads the scores before TRL centers them by group, adds values and advantages to the rollout
# and the value loss to the loss, runs its critic through the pass that splits a batch of any family into chunks, keeps
# the critic out of what is gathered for generation, and has a rollout split again in each pass over it.
for _method in (
    "_generate_single_turn",
    "_prepare_inputs",
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
    "_tokenize_prompts",
):
    require("trl", f"GRPOTrainer.{_method}")

# The images of a rollout are taken apart and put together again as TRL does, and TRL's micro-batches get back the rows
# that its shuffle has taken apart.
split_pixel_values_by_grid = require("trl.trainer.utils", "split_pixel_values_by_grid")
unsplit_pixel_values_by_grid = require("trl.trainer.utils", "unsplit_pixel_values_by_grid")
split_tensor_dict = require("trl.trainer.utils", "split_tensor_dict")
for _trainer in ("GRPOTrainer", "RLOOTrainer"):
    for _method in ("_generate_and_score_completions", "_get_per_token_logps_and_entropies", "_prepare_inputs"):
        require("trl", f"{_trainer}.{_method}")

# The order of the rows: a resumed run draws it again from the start, so PPO makes a sampler whose order depends on
# seed and epoch.
if TYPE_CHECKING:
    from trl.trainer.utils import RepeatSampler as RepeatSampler
else:
    RepeatSampler = require("trl.trainer.utils", "RepeatSampler")
require("trl", "GRPOTrainer._get_train_sampler")

# The type that a fused forward returns: `DPOTrainer` passes precomputed results to TRL in it.
if TYPE_CHECKING:
    from trl.trainer.utils import FusedCausalLMOutput as FusedCausalLMOutput
else:
    FusedCausalLMOutput = require("trl.trainer.utils", "FusedCausalLMOutput")
# The reference under PEFT is the policy with its adapter off, or with the adapter "ref"; TRL switches so.
use_adapter = require("trl.trainer.utils", "use_adapter")
# Gathers what ZeRO-3 has sharded, for generation.
unwrap_model_for_generation = require("trl.models", "unwrap_model_for_generation")
# Gathers what FSDP has sharded, likewise.
DistributedBackend = require("trl.distributed", "DistributedBackend")
# `_compute_loss` runs policy and reference and takes extra batch keys to both; `_prepare_dataset` tokenizes text
# rows; `_set_signature_columns_if_needed` says which columns reach the collator; `compute_ref_log_probs` sums up.
for _method in ("_compute_loss", "_prepare_dataset", "_set_signature_columns_if_needed", "compute_ref_log_probs"):
    require("trl", f"DPOTrainer.{_method}")

# With images, rows are checked where `_prepare_dataset` would tokenize text, and the collator reads columns that
# `_set_signature_columns_if_needed` would drop.
for _method in ("_prepare_dataset", "_set_signature_columns_if_needed"):
    require("trl", f"RewardTrainer.{_method}")

# With a loss over replies alone TRL's constructor takes its own version of the chat template, or fails where it has
# none: then the template is marked before, and TRL's collator is told of it.
get_training_chat_template = require("trl.chat_template_utils", "get_training_chat_template")
if TYPE_CHECKING:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling as DataCollatorForVisionLanguageModeling
else:
    DataCollatorForVisionLanguageModeling = require("trl.trainer.sft_trainer", "DataCollatorForVisionLanguageModeling")

# vLLM gets the policy's weights through this method, which PPO wraps so that vLLM never sees the critic's.
require("trl.generation.vllm_generation", "VLLMGeneration.sync_weights")
# Says where the images of a prompt are, for requests to a vLLM server; pairs are sampled by requests of their own.
require("trl.generation.vllm_generation", "VLLMGeneration._place_features")

# What TRL's constructors leave on a trainer, and we read or set: no import can show that one is gone.
ATTRIBUTES = {
    "DPOTrainer": (
        *("_is_vlm", "_is_vision_dataset", "_tokenizer", "_metrics", "_total_train_tokens", "_tp_size"),
        *("_signature_columns", "aux_loss_enabled", "precompute_ref_logps"),
    ),
    "RewardTrainer": ("_metrics", "_signature_columns", "_total_train_tokens", "_tp_size"),
    "GRPOTrainer": (
        *(
            "_is_vlm",
            "_logs",
            "_metrics",
            "_step",
            "_tokenizer",
            "aux_loss_enabled",
            "eos_token_ids",
            "reward_func_names",
        ),
        *("reward_func_names", "reward_weights", "temperature", "use_vllm", "ref_model", "beta"),
        *("num_generations", "_buffered_inputs"),
    ),
    "RLOOTrainer": ("_buffered_inputs", "_is_vlm", "_step", "aux_loss_enabled", "num_generations", "ref_model"),
}


def check_attributes(trainer: Any) -> None:
    """Stops with the name and the versions where TRL's constructor has not set what we read.

    Raises:
        ImportError: An attribute is missing.
    """
    for base in type(trainer).__mro__:
        if base.__module__.startswith("trl."):
            missing = [name for name in ATTRIBUTES.get(base.__name__, ()) if not hasattr(trainer, name)]
            if missing:
                raise ImportError(_needs(f"{base.__name__}.{missing[0]}"))
