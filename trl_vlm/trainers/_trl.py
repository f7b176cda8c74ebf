"""Every private name of TRL that this package leans on, with the reason.

On a TRL that lacks one of them, importing a trainer says which name is missing and which versions are tested.
`tests/trainers/test_trl_seams.py` holds a contract for each.
"""

import operator
from importlib import import_module
from typing import Any

import trl

TESTED_VERSIONS = "1.16"


def require(module: str, name: str) -> Any:
    """The private `name` (dotted for a method) of a TRL `module`, or an ImportError that says what to install."""
    try:
        return operator.attrgetter(name)(import_module(module))
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"trl_vlm needs `{module}.{name}`, which TRL {trl.__version__} does not have. trl_vlm supports TRL 1.16 "
            f"and later 1.x (tested: {TESTED_VERSIONS}). Run `pip install 'trl>=1.16,<2'`."
        ) from error


# Rollouts turn checkpointing off, as TRL does around its own log-probability passes.
disable_gradient_checkpointing = require("trl.models.utils", "disable_gradient_checkpointing")
# A reference model that the user passes is wrapped for the backend as TRL wraps the ones that it makes.
prepare_deepspeed = require("trl.models", "prepare_deepspeed")
prepare_fsdp = require("trl.models", "prepare_fsdp")
# Gives such a reference model the `log_probs` that TRL reads.
add_fused_lm_head = require("trl.trainer.utils", "add_fused_lm_head")

# What PPO overrides: it reads the scores before TRL centres them by group, adds values and advantages to the rollout
# and the value loss to the loss, and runs its critic through the pass that cuts a batch of any family into chunks.
for _method in (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
):
    require("trl", f"GRPOTrainer.{_method}")

# The order of the rows: a resumed run draws it anew, so PPO makes a sampler whose order depends on seed and epoch.
RepeatSampler = require("trl.trainer.utils", "RepeatSampler")
require("trl", "GRPOTrainer._get_train_sampler")

# The type that a fused forward returns: what `DPOTrainer` computed before is handed to TRL in it.
FusedCausalLMOutput = require("trl.trainer.utils", "FusedCausalLMOutput")
# The reference under PEFT is the policy with its adapter off, or with the adapter "ref"; TRL switches so.
use_adapter = require("trl.trainer.utils", "use_adapter")
# Gathers what ZeRO-3 has spread, for generation.
unwrap_model_for_generation = require("trl.models", "unwrap_model_for_generation")
# Gathers what FSDP has spread, likewise.
DistributedBackend = require("trl.distributed", "DistributedBackend")
# `_compute_loss` runs policy and reference and takes extra batch keys to both; `_prepare_dataset` tokenises text
# rows; `_set_signature_columns_if_needed` says which columns reach the collator; `compute_ref_log_probs` sums up.
for _method in ("_compute_loss", "_prepare_dataset", "_set_signature_columns_if_needed", "compute_ref_log_probs"):
    require("trl", f"DPOTrainer.{_method}")

# With images, rows are checked where `_prepare_dataset` would tokenise text, and the collator reads columns that
# `_set_signature_columns_if_needed` would drop.
for _method in ("_prepare_dataset", "_set_signature_columns_if_needed"):
    require("trl", f"RewardTrainer.{_method}")
