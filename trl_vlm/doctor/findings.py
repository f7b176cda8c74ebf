"""The lines of the report, and how numbers become verdicts."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

# "note" informs, and claims nothing.
Verdict = Literal["ok", "differs", "not possible", "note"]

# How far two ways of computing the same may be apart: as a share of a norm, or in nats, on average over tokens. With
# less than 32 bits, errors hide below it that `--dtype float32` shows.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# What must change something changes it by more than this.
LEAST_CHANGE = 1e-6
# Errors of a model that cannot do what is asked. Others are faults of this package, and stop the program.
_CANNOT = (
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: What was looked at.
        verdict: How it is.
        text: The same for people.
        number: What was measured, if anything was.
        tolerance: What it was compared with.
    """

    name: str
    verdict: Verdict
    text: str
    number: float | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        return f"  {self.verdict:<13} {self.name}: {self.text}"


Sections = Mapping[str, Sequence[Finding]]


def note(name: str, text: str) -> Finding:
    """A line that informs."""
    return Finding(name, "note", text)


def equal(name: str, difference: float, dtype: torch.dtype, what: str) -> Finding:
    """Whether two ways of computing the same agree.

    Args:
        name: What was looked at.
        difference: Between the two.
        dtype: What was computed with.
        what: What the difference is of.
    """
    tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
    verdict = "ok" if difference <= tolerance else "differs"  # nan differs
    text = f"{what} differ by {difference:.1e}, tolerance {tolerance:.0e} in {str(dtype).removeprefix('torch.')}"
    return Finding(name, verdict, text, difference, tolerance)


def changed(name: str, difference: float, what: str, if_not: str) -> Finding:
    """Whether something changed that must.

    Args:
        name: What was looked at.
        difference: How much it changed.
        what: What changed, and by what.
        if_not: What it means if nothing did.
    """
    text = f"{what} change by {difference:.1e}"
    if difference > LEAST_CHANGE:
        return Finding(name, "ok", text, difference, LEAST_CHANGE)
    return Finding(
        name, "differs", f"{text}, at least {LEAST_CHANGE:.0e} was expected: {if_not}", difference, LEAST_CHANGE
    )


def attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """The finding of a check, or why it was not possible."""
    try:
        return check()
    except torch.OutOfMemoryError as error:
        return Finding(name, "not possible", f"the memory of the device does not suffice ({_line(error)})")
    except _CANNOT as error:
        return Finding(name, "not possible", f"{type(error).__name__}: {_line(error)}")


def as_text(sections: Sections) -> str:
    """The report for people, with the numbers of verdicts at its end."""
    lines = []
    for title, findings in sections.items():
        lines += [title, *map(str, findings)]
    counts = Counter(finding.verdict for findings in sections.values() for finding in findings)
    verdicts: tuple[Verdict, ...] = ("ok", "differs", "not possible")
    return "\n".join([*lines, ", ".join(f"{counts[verdict]} {verdict}" for verdict in verdicts)])


def as_json(sections: Sections) -> dict[str, Any]:
    """The report for programs."""
    return {
        "good": not anything_differs(sections),
        "findings": [{"section": title} | asdict(found) for title, every in sections.items() for found in every],
    }


def anything_differs(sections: Sections) -> bool:
    """Whether something is not as it must be."""
    return any(finding.verdict == "differs" for findings in sections.values() for finding in findings)


def _line(error: BaseException) -> str:
    """The message of an error in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
