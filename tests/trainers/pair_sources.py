"""Sources of pairs for tests: what the policy says without sampling, and what a script decides."""

from collections.abc import Sequence

from trl_vlm.data.collators import encode
from trl_vlm.data.rows import ROW_NAME


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


class Greedy:
    """The policy's greedy reply is the rejected one; `seen` keeps what came in and what went out."""

    def __init__(self, max_new_tokens: int = 6, undecided: Sequence[str] = (), extra: int = 0):
        self.max_new_tokens, self.undecided, self.extra = max_new_tokens, undecided, extra
        self.seen: list[dict] = []

    def __call__(self, rows, policy, turn=0):
        model, processor = policy
        names = [row[ROW_NAME] for row in rows]
        images = [row.get("images") or [] for row in rows]
        prompts = [row["prompt"] for row in rows]
        batch = encode(processor, prompts, images, add_generation_prompt=True, padding_side="left", names=names)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=self.max_new_tokens)
        replies = processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        self.seen.append({"turn": turn, "names": names, "replies": replies, "training": model.training})
        return [
            None if name in self.undecided else self.pair(*one)
            for name, *one in zip(names, rows, replies, strict=True)
        ]

    def pair(self, row, reply):
        pair = {**row, "chosen": row.get("completion") or row["chosen"], "rejected": message(reply)}
        pair |= {"pair_source": "greedy", "pair_length": len(reply), "pair_ended": True}
        return pair | ({"rejected_extra": [message(f"{reply} {k}") for k in range(self.extra)]} if self.extra else {})
