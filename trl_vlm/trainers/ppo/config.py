from dataclasses import dataclass, field
from typing import Any

import trl

from trl_vlm.maths.advantages import KL_ESTIMATORS
from trl_vlm.trainers.checks import refuse, refuse_negative
from trl_vlm.trainers.sampled_parts import RolloutOptions

PAPER = {
    "title": "Proximal Policy Optimization Algorithms",
    "id": "1707.06347",
    "citation": """\
@article{schulman2017proximal,
    title  = {{Proximal Policy Optimization Algorithms}},
    author = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
    year   = 2017,
    eprint = {arXiv:1707.06347},
}""",
}


# Fields of TRL's last PPOConfig that `PPOConfig` lacks.
FORMER_NAMES = {
    *("dataset_num_proc", "exp_name", "reward_model_path", "model_adapter_name", "ref_adapter_name"),
    *("local_rollout_forward_batch_size", "num_sample_generations", "stop_token", "stop_token_id"),
    *("sft_model_path", "world_size", "num_total_batches", "micro_batch_size", "local_batch_size"),
    *("batch_size", "local_mini_batch_size", "mini_batch_size"),
}
# GRPO's losses that read one advantage per reply, or another ratio than that of PPO's clipped objective.
OTHER_LOSSES = {"cispo", "luspo", "sapo", "vespo"}


class _AtLeastTwo(int):
    """A number of generations that passes GRPO's check for at least two: PPO's baseline is its critic."""

    def __lt__(self, other: object) -> bool:
        return False


@dataclass
class PPOConfig(RolloutOptions, trl.GRPOConfig):
    """Configuration of `PPOTrainer`: everything of `trl.GRPOConfig`, plus what PPO with a critic needs.

    Names and defaults are those of TRL's last PPOConfig where it had them. Where GRPO has another name for the
    same option (`epsilon`, `num_iterations`, `max_completion_length`), set one of the two. `beta`, the weight of
    GRPO's KL loss,
    is refused: PPO's penalty is part of the reward, see `kl_coef`.
    """

    # Rollouts. TRL's GRPO asks for at least two generations per prompt.
    num_generations: int = field(
        default=1, metadata={"help": "Replies per prompt. The critic is the baseline, so one is enough."}
    )
    response_length: int | None = field(
        default=None, metadata={"help": "Longest reply, in tokens: another name of `max_completion_length`."}
    )
    num_iterations: int = field(default=4, metadata={"help": "Passes over each rollout: PPO epochs."})
    num_ppo_epochs: int | None = field(default=None, metadata={"help": "Another name of `num_iterations`."})
    num_mini_batches: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps per pass over a rollout. A rollout holds this many times "
            "per_device_train_batch_size * gradient_accumulation_steps replies on each process."
        },
    )
    total_episodes: int | None = field(
        default=None, metadata={"help": "Replies to sample in total; sets `max_steps`."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Turn dropout off, so that the ratio of the first step is exactly 1."}
    )

    # Reward
    kl_coef: float = field(
        default=0.05, metadata={"help": "Weight of the per-token KL penalty in the reward; 0 needs no reference."}
    )
    kl_estimator: str = field(
        default="k1",
        metadata={"help": "`k1`, `k3` or `clamped_k1` (published Fact-RLHF), see `advantages.per_token_kl`."},
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL per reply in nats to steer `kl_coef` towards; fixed coefficient if unset."},
    )
    kl_horizon: int = field(
        default=10_000, metadata={"help": "Replies over which `kl_coef` adapts; larger is slower."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Positive number subtracted from the score of a reply that does not end."}
    )

    # Advantages
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale per-token rewards to unit variance before estimating advantages."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Whiten advantages over the real tokens of the rollout on all processes."}
    )

    # Losses
    cliprange: float | None = field(
        default=None, metadata={"help": "Clip range of the policy ratio: another name of `epsilon`."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "How far a value may move from the rollout's value, in units of the return."}
    )

    # Critic
    value_head_init: str = field(
        default="zero",
        metadata={"help": "`zero` (published) or `trained`: keep the reward model's head as the first value head."},
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic; the policy's if unset."}
    )

    # Vision
    check_pixels: bool = field(
        default=True,
        metadata={"help": "Before the first step, stop if log-probabilities do not depend on the pixels."},
    )

    def __new__(cls, *args: Any, **options: Any) -> "PPOConfig":
        """Names the migration table for the options that TRL's last PPOConfig had and this one has not."""
        former = sorted(FORMER_NAMES & set(options))
        if former:
            raise TypeError(
                f"{former} are options of TRL's last PPOConfig that this one does not have. \"Moving over from "
                "TRL's last PPOTrainer\" in docs/methods/ppo.md says what takes their place."
            )
        return super().__new__(cls)

    def __post_init__(self):
        self._use_old_name("cliprange", "epsilon")
        self._use_old_name("num_ppo_epochs", "num_iterations")
        self._use_old_name("response_length", "max_completion_length")
        self._check_values()
        self._set_rollout_size()
        # TRL gathers the images of every rollout, even if nothing shows them, and hangs where the rows of one process
        # have none. Delete when `trl.GRPOTrainer` gathers them for `log_completions` alone.
        self.log_multimodal = self.log_multimodal and self.log_completions
        # GRPOTrainer makes a reference model, and its log-probabilities, where `beta` is not zero.
        self.beta = self.kl_coef
        replies, self.num_generations = self.num_generations, _AtLeastTwo(self.num_generations)
        super().__post_init__()
        self.num_generations = replies
        if self.total_episodes is not None:
            assert self.generation_batch_size is not None  # GRPOConfig has computed it
            rollouts = max(1, self.total_episodes // self.generation_batch_size)
            self.max_steps = rollouts * self.num_mini_batches * self.num_iterations

    def _use_old_name(self, old: str, new: str) -> None:
        """Takes the value of TRL's old PPO name, unless its GRPO name says something else."""
        value, default = getattr(self, old), self.__dataclass_fields__[new].default
        if value is None:
            return
        if getattr(self, new) not in (default, value):
            raise ValueError(f"`{old}={value}` and `{new}={getattr(self, new)}` name the same thing: set one of them.")
        setattr(self, new, value)

    def complete_from_trl(self) -> None:
        """Completes a `trl.GRPOConfig` with what the constructor would derive from PPO's defaults."""
        self._check_values()
        self.log_multimodal = self.log_multimodal and self.log_completions
        self.beta = self.kl_coef

    def _check_values(self) -> None:
        if self.beta not in (0.0, self.kl_coef):
            raise ValueError(
                f"`beta` is {self.beta}: it weighs GRPO's KL loss. PPO's KL penalty is part of the reward; "
                "set `kl_coef` instead."
            )
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model` moves the reference after the policy, whose parameters include PPO's critic: TRL "
                "would pair the wrong ones. Keep the reference, and steer its weight with `kl_target`."
            )
        self._refuse_options_of_grpo()
        self._check_choices()
        self._check_ranges()

    def _refuse_options_of_grpo(self) -> None:
        """Refuses GRPO's scaling of rewards within a group: PPO's advantages come from rewards and values."""
        default = {name: field.default for name, field in trl.GRPOConfig.__dataclass_fields__.items()}
        aggregation = self.multi_objective_aggregation
        refuse(
            "PPO",
            {
                f"`scale_rewards={self.scale_rewards!r}`": (
                    # TRL writes True as "group" and False as "none".
                    self.scale_rewards not in (default["scale_rewards"], True),
                    "it scales the rewards of a group of replies, and PPO has no groups (see `whiten_rewards`)",
                ),
                f"`multi_objective_aggregation={aggregation!r}`": (
                    aggregation != default["multi_objective_aggregation"],
                    "it normalizes each reward within a group of replies, and PPO has no groups",
                ),
                f"`loss_type={self.loss_type!r}`": (
                    self.loss_type in OTHER_LOSSES,
                    "it replaces the clipped objective per token, which PPO is",
                ),
            },
        )

    def _check_choices(self) -> None:
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"`kl_estimator` is {self.kl_estimator!r}; it must be one of {', '.join(KL_ESTIMATORS)}.")
        if self.value_head_init not in ("zero", "trained"):
            raise ValueError(f"`value_head_init` is {self.value_head_init!r}; it must be 'zero' or 'trained'.")

    def _check_ranges(self) -> None:
        for name, low, high in (("gamma", 0, 1), ("lam", 0, 1), ("kl_coef", 0, float("inf"))):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must lie between {low} and {high}.")
        for name in ("num_generations", "num_mini_batches", "num_iterations", "cliprange_value", "kl_horizon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be positive.")
        refuse_negative({"vf_coef": self.vf_coef}, "the critic would learn to be wrong")
        refuse_negative({"value_learning_rate": self.value_learning_rate}, "the optimizer would climb the loss")
        clip = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high}
        refuse_negative(clip, "it is the distance from 1 at which the ratio is clipped")
        refuse_negative({"missing_eos_penalty": self.missing_eos_penalty}, "it is subtracted")
        if self.kl_target is not None and (self.kl_target <= 0 or self.kl_coef == 0):
            raise ValueError("`kl_target` steers `kl_coef`: both must be positive.")

    def _set_rollout_size(self) -> None:
        """A rollout holds `num_mini_batches` optimizer batches."""
        if self.num_mini_batches == 1:
            return
        if self.steps_per_generation is not None or self.generation_batch_size is not None:
            raise ValueError(
                "`num_mini_batches` sets the size of a rollout, and so do `steps_per_generation` and "
                "`generation_batch_size`: set one of them."
            )
        self.steps_per_generation = self.num_mini_batches * self.gradient_accumulation_steps
