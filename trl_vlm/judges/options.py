"""Judges and chats made of plain options, shared by the command line and the scripts."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from trl_vlm.judges.chat import Chat, LocalChat
from trl_vlm.judges.claims import ChatClaimChecker, ClaimJudge, LocalClaimChecker, RewrittenClaims
from trl_vlm.judges.endpoint import EndpointChat
from trl_vlm.judges.judge import Judge
from trl_vlm.judges.pairwise import PairwiseJudge
from trl_vlm.judges.reward import RewardJudge
from trl_vlm.rewards.claims import sentence_claims
from trl_vlm.rewards.remote import RemoteReward
from trl_vlm.rewards.reward_model import RewardModelReward

ANSWERS = "~/.cache/trl_vlm/answers"


@dataclass(kw_only=True)
class ChatOptions:
    """Where a model that answers runs, and how it is asked; each field is an option of a command line."""

    endpoint: str | None = field(
        default=None,
        metadata={
            "help": "Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1. Without it the model "
            "is loaded on the device of each process."
        },
    )
    key_variable: str | None = field(
        default=None,
        metadata={"help": "Environment variable that holds the endpoint's key. Without it no key is sent."},
    )
    max_answer_tokens: int | None = field(default=512, metadata={"help": "Longest answer, in tokens."})
    max_completion_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest answer with the reasoning before it, for endpoints that want `max_completion_tokens` in "
            "place of `max_tokens`."
        },
    )
    answer_temperature: float | None = field(
        default=0.0,
        metadata={"help": "Temperature of the endpoint's answers; none sends none, for models that refuse one."},
    )
    extra_body: dict | str | None = field(
        default=None,
        metadata={"help": "Further settings of each request to the endpoint, as JSON: '{\"top_p\": 0.9}'."},
    )
    image_side: int = field(
        default=1536, metadata={"help": "Longest side of an image that is sent to the endpoint, in pixels."}
    )
    concurrency: int = field(default=8, metadata={"help": "Requests to the endpoint at once."})
    timeout_seconds: float = field(default=120.0, metadata={"help": "Time limit of one request."})
    retries: int = field(default=6, metadata={"help": "Attempts after the first, for failures that may pass."})
    first_wait_seconds: float = field(
        default=1.0, metadata={"help": "Wait before the second attempt; it doubles with each further one."}
    )
    max_requests: int | None = field(
        default=10_000,
        metadata={"help": "Requests that a process may send to the endpoint, repeated ones included."},
    )
    prompt_price: float | None = field(
        default=None,
        metadata={"help": "Price of a million tokens of requests; with it the cost is shown as it runs."},
    )
    completion_price: float | None = field(
        default=None, metadata={"help": "Price of a million tokens of answers, as `prompt_price`."}
    )
    cache: str | None = field(
        default=ANSWERS,
        metadata={
            "help": "Folder of answers of the endpoint, and of claims that were checked on this machine. What is "
            "there is not asked for again."
        },
    )
    chat_batch_size: int = field(default=8, metadata={"help": "Requests at once to a model without endpoint."})

    # Fields that change how answers are obtained, and not what they say.
    not_about_answers: ClassVar[frozenset[str]] = frozenset(
        {
            "key_variable",
            "concurrency",
            "timeout_seconds",
            "retries",
            "first_wait_seconds",
            "max_requests",
            "prompt_price",
            "completion_price",
            "cache",
            "chat_batch_size",
        }
    )

    def __post_init__(self) -> None:
        """Reads `extra_body`.

        Raises:
            ValueError: It is no JSON object.
        """
        if isinstance(self.extra_body, str):
            self.extra_body = _json_object(self.extra_body)

    def chat(self, model: str) -> Chat:
        """The model that answers: behind the endpoint if there is one, else on this process's device."""
        if self.endpoint is None:
            return LocalChat(
                model,
                max_new_tokens=self.max_completion_tokens or self.max_answer_tokens or 512,
                batch_size=self.chat_batch_size,
                dtype="auto",
            )
        return EndpointChat(
            self.endpoint,
            model,
            key_variable=self.key_variable,
            max_tokens=None if self.max_completion_tokens else self.max_answer_tokens,
            temperature=self.answer_temperature,
            extra_body=self._body(),
            concurrency=self.concurrency,
            timeout_seconds=self.timeout_seconds,
            retries=self.retries,
            first_wait_seconds=self.first_wait_seconds,
            max_requests=self.max_requests,
            prompt_price=self.prompt_price,
            completion_price=self.completion_price,
            cache=None if self.cache is None else Path(self.cache).expanduser(),
            image_side=self.image_side,
        )

    def _body(self) -> dict[str, Any] | None:
        body: dict[str, Any] = {}
        if isinstance(self.extra_body, dict):  # text was read by `__post_init__`
            body |= self.extra_body
        if self.max_completion_tokens:
            body["max_completion_tokens"] = self.max_completion_tokens
        return body or None


@dataclass(kw_only=True)
class WriterOptions(ChatOptions):
    """The language model that rewrites replies, see `Corrupted`."""

    writer_model: str = field(
        metadata={"help": "Model that rewrites: a folder or hub id, or its name at the endpoint."}
    )

    def make(self) -> Chat:
        """The model."""
        return self.chat(self.writer_model)

    def local_models(self) -> list[str]:
        """The models that `make` loads, on each process."""
        return [self.writer_model] if self.endpoint is None else []


def _chat_judge(options: "JudgeOptions") -> Judge:
    if options.judge_model is None:
        raise ValueError(f"The judge {kind_of(options)!r} needs a model. Set `judge_model`.")
    return PairwiseJudge(
        options.chat(options.judge_model),
        both_orders=options.both_orders,
        show_ground_truth=options.show_ground_truth,
    )


def _endpoint_judge(options: "JudgeOptions") -> Judge:
    if options.endpoint is None:
        raise ValueError("The judge 'endpoint' needs an address. Set `endpoint`, such as http://localhost:8000/v1.")
    return _chat_judge(options)


def _local_judge(options: "JudgeOptions") -> Judge:
    if options.endpoint is not None:
        raise ValueError(f"The judge 'local' does not ask an endpoint. Unset `endpoint` ({options.endpoint!r}).")
    return _chat_judge(options)


def _reward_judge(options: "JudgeOptions") -> Judge:
    server = options.server()
    if server is not None:
        server.health()  # refuses an address where none answers, before there is anything to score
        return RewardJudge(server, options.min_gap)
    if options.reward_model is None:
        raise ValueError(
            "The judge 'reward' needs a reward model. Set `reward_model` to its folder or hub id, or `reward_server` "
            "to the address of a server that has it."
        )
    return RewardJudge(RewardModelReward(options.reward_model), options.min_gap)


def _claim_judge(options: "JudgeOptions") -> Judge:
    if options.judge_model is None:
        raise ValueError("The judge 'claims' needs a model that sees images. Set `judge_model`.")
    splitter = sentence_claims if options.claim_writer is None else RewrittenClaims(options.chat(options.claim_writer))
    return ClaimJudge(_claim_checker(options, options.judge_model), splitter, min_gap=options.min_gap)


def _claim_checker(options: "JudgeOptions", model: str) -> ChatClaimChecker | LocalClaimChecker:
    if options.endpoint is not None:
        return ChatClaimChecker(options.chat(model))
    return LocalClaimChecker(
        model,
        threshold=options.claim_threshold,
        batch_size=options.chat_batch_size,
        cache=None if options.cache is None else Path(options.cache).expanduser(),
        dtype="auto",
    )


# Name -> what makes the judge of the options.
JUDGES: dict[str, Callable[["JudgeOptions"], Judge]] = {
    "local": _local_judge,
    "endpoint": _endpoint_judge,
    "reward": _reward_judge,
    "claims": _claim_judge,
}


@dataclass(kw_only=True)
class JudgeOptions(ChatOptions):
    """Which judge compares replies; each field is an option of a command line."""

    judge: str | None = field(
        default=None,
        metadata={
            "help": "Kind of judge: local (a vision-language model on this machine), endpoint (one behind an "
            "address), reward (a reward model, here or behind an address), or claims (a model, here or behind the "
            "endpoint, that checks each claim of a reply against the image). Without it, the other options decide "
            "between the first three.",
            "choices": tuple(JUDGES),
        },
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "Model that judges: a folder or hub id, or its name at the endpoint."},
    )
    reward_model: str | None = field(default=None, metadata={"help": "Reward model that judges: a folder or hub id."})
    reward_server: str | None = field(
        default=None,
        metadata={
            "help": "Address of a reward model that judges and that `trl-vlm serve-reward` serves, such as "
            "http://gpu-7:8100."
        },
    )
    reward_server_key_variable: str | None = field(
        default=None,
        metadata={"help": "Environment variable that holds the reward server's key. Without it no key is sent."},
    )
    both_orders: bool = field(
        default=True,
        metadata={"help": "Ask about both orders of the replies and count only verdicts that agree."},
    )
    show_ground_truth: bool = field(
        default=False, metadata={"help": "Show the judge the row's facts and its reference reply."}
    )
    min_gap: float = field(
        default=0.0,
        metadata={"help": "Rewards, or numbers of wrong claims, that differ by this much or less are no decision."},
    )
    claim_writer: str | None = field(
        default=None,
        metadata={
            "help": "With the judge claims: model that writes down the claims of a reply, a folder or hub id, or its "
            "name at the endpoint. Without it each sentence is a claim."
        },
    )
    claim_threshold: float = field(
        default=0.5,
        metadata={
            "help": "With the judge claims on this machine: a claim is true if P(yes) / (P(yes) + P(no)) is above."
        },
    )

    # Which model a reward server has counts, and not where it is: `further_settings`.
    not_about_answers: ClassVar[frozenset[str]] = ChatOptions.not_about_answers | {
        "reward_server",
        "reward_server_key_variable",
    }

    def make(self) -> Judge:
        """The judge."""
        return judge_of(self)

    def local_models(self) -> list[str]:
        """The models that `make` loads, on each process."""
        if kind_of(self) == "reward":
            return [self.reward_model] if self.reward_model is not None else []
        models = (self.judge_model, self.claim_writer) if self.endpoint is None else ()
        return [model for model in models if model is not None]

    def server(self) -> RemoteReward | None:
        """The reward server, if there is one."""
        if self.reward_server is None:
            return None
        return RemoteReward(self.reward_server, key_variable=self.reward_server_key_variable)

    def further_settings(self) -> dict[str, Any]:
        """What else determines verdicts: the model that a reward server says it has.

        Raises:
            ConnectionError: No reward server answers.
        """
        server = self.server()
        return {} if server is None else {"reward served": server.served()}


def kind_of(options: JudgeOptions) -> str:
    """The name in `JUDGES` of the judge that the options describe.

    Raises:
        ValueError: They name no judge, two, or an unknown one.
    """
    named = {name: getattr(options, name) for name in ("judge_model", "reward_model", "reward_server")}
    given = [f"`{name}` ({value!r})" for name, value in named.items() if value is not None]
    if options.judge is not None and options.judge not in JUDGES:
        raise ValueError(f"`judge` is {options.judge!r}. It must be one of {', '.join(JUDGES)}.")
    if len(given) > 1 or (options.judge is None and not given):
        raise ValueError(
            f"The judge is {' and '.join(given) or 'not named'}. Set exactly one of `judge_model`, `reward_model` and "
            "`reward_server`, so that there is one judge."
        )
    if options.judge is not None:
        return options.judge
    if options.judge_model is None:
        return "reward"
    return "local" if options.endpoint is None else "endpoint"


def judge_of(options: JudgeOptions) -> Judge:
    """The judge that the options describe.

    Raises:
        ValueError: They describe no judge, or one that lacks something.
    """
    return JUDGES[kind_of(options)](options)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`extra_body` is {text!r}, which is no JSON. Write '{{\"name\": value}}'.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`extra_body` is {text!r}. It must be a JSON object: '{{\"name\": value}}'.")
    return value
