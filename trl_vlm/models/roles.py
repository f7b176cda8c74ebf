"""One base model in several roles: LoRA adapters of one PEFT model, and a head for each role that scores.

The policy, its reference, a critic and reward models then hold the weights of one model instead of four. A role
computes what a model of its own would: in float32 its scores and gradients are the same.
"""

import copy
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from trl_vlm.models._checkpointing import restore_adapters_in_recomputation, stop_restoring_adapters
from trl_vlm.models._peft import acting, adapted_layers
from trl_vlm.models.generation import evaluating, forked_generators
from trl_vlm.models.reward_model import HEAD_KEY, RewardOutput, ScoreHead, last_attended_token

CRITIC = "value_model"  # the critic's adapter, child of the policy, and folder
REWARD = "reward_model"  # the same of a reward model

HEADS = ("score", "classifier")  # what PEFT puts into `modules_to_save` of a classifier


@dataclass
class RoleStart:
    """What a role starts from.

    Attributes:
        name: Its adapter, child of the policy, and folder.
        config: The adapter's configuration, as of a sequence classifier: it is saved with the role.
        weights: The adapter's, as `load_peft_weights` gives them; None draws a new one.
        head: (1, H); None is a head of zeros.
        trains: Whether adapter and head are trained.
        seed: Of a new adapter; the same on every process.
    """

    name: str
    config: LoraConfig
    weights: dict[str, Tensor] | None = None
    head: Tensor | None = None
    trains: bool = False
    seed: int = 0


@dataclass
class RoleOutput(ModelOutput):
    """What the policy's forward returns while a role runs in it.

    Attributes:
        token_scores: The head at every token, (B, T), in float32.
    """

    token_scores: Tensor | None = None


class RoleModel(nn.Module):
    """A sequence classifier that holds its head alone: the rest is the policy's base under an adapter of its own.

    It is a child of the policy, so that optimizers, wrappers and checkpoints hold its head.
    """

    def __init__(self, start: RoleStart, base: "SharedBase"):
        super().__init__()
        self.adapter, self.adapter_config, self.trains = start.name, start.config, start.trains
        size = base.policy.config.get_text_config().hidden_size
        self.score = ScoreHead(size, 1, bias=False, dtype=torch.float32)
        with torch.no_grad():
            if start.head is None:
                self.score.weight.zero_()
            else:
                self.score.weight.copy_(start.head)
        self.score.requires_grad_(start.trains)
        self.base = base
        self._frozen: dict[str, Tensor] | None = None
        if not start.trains and start.weights is not None and start.head is not None:
            self._frozen = {**start.weights, HEAD_KEY: start.head}

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the base."""
        return self.base.policy.config

    def get_base_model(self) -> PreTrainedModel:
        """The base, under the name that PEFT gives it."""
        return self.base.model

    @property
    def device(self) -> torch.device:
        """Where the head is, and so the base."""
        return self.score.weight.device

    def role_parameters(self) -> list[nn.Parameter]:
        """What is this role's own: its adapter and its head."""
        return [*self.base.adapter_parameters(self.adapter).values(), *self.score.parameters()]

    def read(self, **inputs: Any) -> Tensor:
        """The head at every token, (B, T) in float32; only inside the policy's forward."""
        base = self.base.model
        with self.base.acting(self.adapter):
            hidden = getattr(base, base.base_model_prefix)(**inputs, use_cache=False).last_hidden_state
        return self.score(hidden).squeeze(-1)

    def token_scores(self, **inputs: Any) -> Tensor:
        """The head at every token, (B, T) in float32, through the policy's forward."""
        return self.base.run(self, inputs)

    def forward(self, **inputs: Any) -> RewardOutput:
        """Scores rows of text and images, as the reward model does that this role stands for."""
        scores = self.token_scores(**inputs)
        last = last_attended_token(inputs.get("attention_mask"), scores[..., None])
        return RewardOutput(logits=scores[torch.arange(len(scores), device=scores.device), last][:, None])

    def save_pretrained(self, folder: str | os.PathLike, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes the adapter's folder of an ordinary reward model.

        Args:
            folder: Where; it is made.
            state_dict: The whole state of the policy, where a backend has gathered it.
        """
        weights = self._weights(state_dict)
        config = copy.deepcopy(self.adapter_config)
        config.inference_mode = True
        os.makedirs(folder, exist_ok=True)
        save_file(
            {name: weight.contiguous().cpu() for name, weight in weights.items()},
            os.path.join(folder, "adapter_model.safetensors"),
            metadata={"format": "pt"},
        )
        config.save_pretrained(str(folder))

    def _weights(self, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Adapter and head by the names that they are saved under."""
        if self._frozen is not None:  # ZeRO-3 gathers what trains alone
            return dict(self._frozen)
        state = self.base.policy.state_dict() if state_dict is None else state_dict
        head = state[f"{self.adapter}.score.weight"]
        return {**self.base.adapter_state(self.adapter, state), HEAD_KEY: head}

    def load(self, folder: str | os.PathLike) -> None:
        """Reads what `save_pretrained` wrote.

        Raises:
            ValueError: The folder holds another adapter.
        """
        weights = load_peft_weights(str(folder), device="cpu")
        head = weights.pop(HEAD_KEY, None)
        if head is None:
            raise ValueError(f"{folder} holds no head ({HEAD_KEY}): it is not the folder of a role.")
        self.base.set_adapter_state(self.adapter, weights, str(folder))
        with torch.no_grad():
            self.score.weight.copy_(head)


class SharedBase:
    """A policy with further roles: their adapters beside its own, their heads as its children.

    Every role runs inside the policy's own forward, where sharded backends gather what the root of a model owns.

    Args:
        policy: A PEFT model with a LoRA adapter, whose base is frozen.
        starts: The roles, each under a name of its own.
    """

    def __init__(self, policy: PeftModel, starts: Sequence[RoleStart]):
        remove_roles(policy)
        self.policy = policy
        assert isinstance(policy.active_adapter, str)  # PEFT activates one at a time
        self.policy_adapter = policy.active_adapter
        # TRL keeps a copy of an adapter that came with the policy; else the reference is the bare base.
        self.reference = "ref" if "ref" in policy.peft_config else None
        self._running: RoleModel | None = None
        trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        self.roles = {start.name: self._added(start) for start in starts}
        self._layers = adapted_layers(self.model)
        for name, parameter in self.model.named_parameters(prefix="base_model.model"):
            role = next((role for role in self.roles.values() if f".{role.adapter}." in name), None)
            # Adding an adapter makes it trainable, and freezes all others.
            parameter.requires_grad_(name in trained if role is None else role.trains)
        self._run_roles_in_forward()
        restore_adapters_in_recomputation(self.model)

    @property
    def model(self) -> PreTrainedModel:
        """The base, without PEFT's wrapper."""
        model = self.policy.get_base_model()
        assert isinstance(model, PreTrainedModel)
        return model

    def acting(self, adapter: str | None) -> AbstractContextManager[None]:
        """Within this context the base computes with `adapter`, or with none; what trains stays as it is."""
        return acting(self._layers, adapter)

    def acting_as_reference(self) -> AbstractContextManager[None]:
        """Within this context the policy computes as the reference: the adapter that it came with, or none."""
        return self.acting(self.reference)

    def evaluating(self) -> AbstractContextManager[None]:
        """Within this context the base is in evaluation mode and makes no gradient; then each module is as it was."""
        return evaluating(self.policy)

    def run(self, role: RoleModel, inputs: dict[str, Any]) -> Tensor:
        """The head of a role at every token, (B, T), computed inside the policy's forward."""
        assert self._running is None
        self._running = role
        try:
            return self.policy(**inputs).token_scores
        finally:
            self._running = None

    @contextmanager
    def policy_alone(self) -> Iterator[None]:
        """Within this context the policy shows its own adapter alone: to PEFT's saving, and to vLLM.

        PEFT's filter leaves out the adapters that it knows, so the others must not be hidden from `peft_config`.
        """
        for name in self.roles:
            self.policy._modules.pop(name)
        save = functools.partial(self.policy.save_pretrained, selected_adapters=[self.policy_adapter])
        vars(self.policy)["save_pretrained"] = save
        try:
            yield
        finally:
            del vars(self.policy)["save_pretrained"]
            for name, role in self.roles.items():
                self.policy.add_module(name, role)

    def policy_state(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The part of a whole state that is the policy's."""
        return {
            name: value
            for name, value in state_dict.items()
            if not any(name.startswith(f"{role}.") or f".{role}." in name for role in self.roles)
        }

    def load_policy(self, folder: str | os.PathLike) -> None:
        """Reads the policy's adapter from a checkpoint; what trains stays as it is.

        `Trainer` would also load the adapters of the roles' folders, and make them trainable.
        """
        self.set_adapter_state(self.policy_adapter, load_peft_weights(str(folder), device="cpu"), str(folder))

    def held(self) -> dict[str, list[nn.Parameter]]:
        """The weights that each role holds of its own, by role; "base" is what they share."""
        adapters = {name: list(self.adapter_parameters(name).values()) for name in self.policy.peft_config}
        own = {id(parameter) for parameters in adapters.values() for parameter in parameters}
        base = [parameter for parameter in self.model.parameters() if id(parameter) not in own]
        held = {"base": base, "policy": adapters[self.policy_adapter], "reference": adapters.get("ref", [])}
        return held | {name: role.role_parameters() for name, role in self.roles.items()}

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by their names in the base."""
        return {name: value for name, value in self.model.named_parameters() if f".{adapter}." in name}

    def adapter_state(self, adapter: str, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of one adapter under the names that PEFT saves."""
        # By default PEFT asks the hub whether the embeddings have grown; a LoRA role does not touch them.
        return get_peft_model_state_dict(
            self.policy, state_dict=state_dict, adapter_name=adapter, save_embedding_layers=False
        )

    def set_adapter_state(self, adapter: str, weights: dict[str, Tensor], source: str) -> None:
        """Gives an adapter its weights.

        Raises:
            ValueError: The weights are those of another adapter.
        """
        report = set_peft_model_state_dict(self.policy, weights, adapter_name=adapter)
        missing = [name for name in report.missing_keys if f".{adapter}." in name]
        if report.unexpected_keys or missing:
            raise ValueError(
                f"{source} does not fit the adapter `{adapter}` of the policy's base: {missing[:3]} are missing and "
                f"{list(report.unexpected_keys)[:3]} are not part of it. Resume with the arguments that the run was "
                "started with; `share_base=False` gives each role a model of its own."
            )

    def _added(self, start: RoleStart) -> RoleModel:
        config = copy.deepcopy(start.config)
        config.task_type = self.policy.peft_config[self.policy_adapter].task_type
        config.inference_mode = not start.trains
        config.modules_to_save = None  # the head is the role's
        options = {"autocast_adapter_dtype": False} if is_deepspeed_zero3_enabled() else {}
        device = self.policy.device
        with forked_generators(torch.device("cpu") if device.type == "meta" else device):
            torch.manual_seed(start.seed)
            self.policy.add_adapter(start.name, config, **options)
            role = RoleModel(start, self)
        if start.weights is not None:
            self.set_adapter_state(start.name, start.weights, f"The adapter of `{start.name}`")
        # ZeRO-3 splits trainable parameters of one precision alone.
        own = next(iter(self.adapter_parameters(start.name).values()))
        role.score.to(own.device, own.dtype if is_deepspeed_zero3_enabled() else torch.float32)
        self.policy.add_module(start.name, role)
        return role

    def _run_roles_in_forward(self) -> None:
        policy_forward = self.policy.forward

        # `generate` validates its arguments against the signature, so the wrapper keeps it.
        @functools.wraps(policy_forward)
        def forward(*args: Any, **kwargs: Any) -> ModelOutput:
            if self._running is not None:
                return RoleOutput(token_scores=self._running.read(**kwargs))
            return policy_forward(*args, **kwargs)

        self.policy.forward = forward


def remove_roles(policy: nn.Module) -> None:
    """Undoes `SharedBase`, on a policy that an earlier run has left with its roles."""
    roles = [child for child in policy.children() if isinstance(child, RoleModel)]
    if not roles:
        return
    assert isinstance(policy, PeftModel)
    trained = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    for role in roles:
        del policy._modules[role.adapter]
        policy.delete_adapter(role.adapter)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(trained[name])
    del policy.forward
    stop_restoring_adapters(roles[0].base.model)


def classifier_config(config: LoraConfig, base: str | None) -> LoraConfig:
    """The configuration under which a role that starts from no reward model is saved.

    Args:
        config: The adapter's.
        base: Where the base lies.
    """
    config = copy.deepcopy(config)
    config.task_type, config.modules_to_save, config.base_model_name_or_path = (
        TaskType.SEQ_CLS,
        ["score"],
        base or None,
    )
    return config
