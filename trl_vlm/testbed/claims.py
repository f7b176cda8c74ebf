"""A checker of claims that knows the truth, in the place of a model."""

from collections.abc import Sequence

from trl_vlm.rewards.claims import ClaimQuestion, ClaimVerdict
from trl_vlm.testbed.oracle import find_objects

NAMES_NOTHING = "the claim names no object"


class OracleClaimChecker:
    """Says of claims what the row's column `objects` says; a claim that names no object is undecided."""

    def check(self, questions: Sequence[ClaimQuestion]) -> list[ClaimVerdict]:
        """A claim is true if all kinds that it names are present."""
        return [self._verdict(question) for question in questions]

    def _verdict(self, question: ClaimQuestion) -> ClaimVerdict:
        named = set(find_objects(question.text))
        if not named:
            return ClaimVerdict(None, NAMES_NOTHING)
        return ClaimVerdict(named <= set(question.row["objects"]))
