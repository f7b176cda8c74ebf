"""What endpoints have cost so far, shown while a run goes on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spending:
    """Requests, tokens and money.

    Args:
        requests: Requests sent, repeated ones included.
        from_cache: Answers that were not asked for again.
        prompt_tokens: Tokens of the requests, as far as the endpoint counts them.
        completion_tokens: Tokens of the answers.
        cost: By the prices that the user gave, in their currency; None without prices.
    """

    requests: int = 0
    from_cache: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None

    def __add__(self, other: "Spending") -> "Spending":
        costs = [cost for cost in (self.cost, other.cost) if cost is not None]
        return Spending(
            self.requests + other.requests,
            self.from_cache + other.from_cache,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            sum(costs) if costs else None,
        )

    def __bool__(self) -> bool:
        return bool(self.requests or self.from_cache)

    def __str__(self) -> str:
        parts = [f"{self.requests:,} requests"]
        if self.from_cache:
            parts.append(f"{self.from_cache:,} answers from the cache")
        if self.prompt_tokens or self.completion_tokens:
            parts.append(f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens")
        if self.cost is not None:
            parts.append(f"cost {self.cost:,.2f}")
        return ", ".join(parts)


def spending_of(asking: object) -> Spending:
    """What a chat, or a judge or a pair source that asks chats, has spent; nothing where no endpoint is asked."""
    return sum(_spendings(asking).values(), Spending())


def _spendings(asking: object) -> dict[int, Spending]:
    """By the identity of the chat: a judge may ask one for two purposes."""
    spent = getattr(asking, "spending", None)
    if isinstance(spent, Spending):
        return {id(asking): spent}
    found: dict[int, Spending] = {}
    for name in ("chat", "judge", "checker", "splitter", "first", "second"):
        part = getattr(asking, name, None)
        found |= {} if part is None else _spendings(part)
    return found
