"""Replies of a rollout sampled a few at a time, where the keys and values of all of them do not fit the device."""

from dataclasses import dataclass, field
from typing import Any

from trl_vlm.trainers.checks import refuse
from trl_vlm.trainers.options import GroupOptions
from trl_vlm.trainers.preparation import PreparedTrainer


@dataclass
class RolloutOptions(GroupOptions):
    """Options of all trainers that sample replies: a mixin before TRL's configuration."""

    sampling_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Replies that a process samples at once, where transformers samples them. A rollout is often "
            "hundreds, and each keeps keys and values (0.4 GiB for 900 tokens of a LLaVA-1.5-7B). None: all at once."
        },
    )

    def check_parts(self) -> None:
        """As for all trainers; also refuses fewer than one reply at once."""
        super().check_parts()
        size = self.sampling_batch_size
        if size is None:
            return
        if size < 1:
            raise ValueError(f"`sampling_batch_size` is {size}; sample at least 1 reply at once, or set None.")
        options = vars(self)
        refuse(
            "`sampling_batch_size`",
            {
                "`use_vllm`": (bool(options.get("use_vllm")), "vLLM decides how many replies it samples at once"),
                "`use_transformers_continuous_batching`": (
                    bool(options.get("use_transformers_continuous_batching")),
                    "it has a memory limit of its own",
                ),
            },
        )


class SampledInParts(PreparedTrainer):
    """Lets `generate` see a few prompts at a time: a mixin before TRL's trainer.

    With sampling, other replies are drawn than all at once; they come from the same distribution.
    """

    args: RolloutOptions
    _tokenized: tuple[list[list[int]], list[Any]] | None = None

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, Any]:
        trainer: Any = super()  # one of TRL's, which have no base for rollouts in common
        made = trainer._tokenize_prompts(prompts)
        self._tokenized = made[0], prompts
        return made

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        size, tokenized = self.args.sampling_batch_size, self._tokenized
        self._tokenized = None
        # After a call of a tool, prompts hold what it returned and are not those that were tokenized.
        if size is None or len(prompt_ids) <= size or tokenized is None or tokenized[0] is not prompt_ids:
            return trainer._generate_single_turn(prompt_ids, *args, **kwargs)
        replies, has_log_probs = [], False
        images_and_fields = 2  # the arguments that belong to all prompts
        for start in range(0, len(prompt_ids), size):
            # Which pixels belong to which prompt is the processor's to say.
            part = trainer._tokenize_prompts(tokenized[1][start : start + size])
            made = trainer._generate_single_turn(*part, *args[images_and_fields:], **kwargs)
            has_log_probs = isinstance(made, tuple)  # GRPO: None where transformers samples
            replies += made[0] if has_log_probs else made
        return (replies, None) if has_log_probs else replies
