"""What becomes of an answer that is not sure.

    "abstain_above": {"score": "mi_mean", "value": 0.08, "action": "refuse"}

    flag     it is answered, and `uncertainty.abstained` says so
    refuse   the text is left out: in chat `message.refusal` has the reason
    route    another model, `route_to`, answers instead

`abstain_below` is for scores that are large when an answer is sure. A score that is not known (too late, or failed) is
no proof that an answer is: `abstained` is null then, and what is to be refused or routed is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

ABOVE, BELOW = "abstain_above", "abstain_below"
#: Scores that are large when an answer is sure.
SURE = frozenset({"confidence", "label_mass", "agreement"})


class Action(StrEnum):
    FLAG = "flag"
    REFUSE = "refuse"
    ROUTE = "route"


@dataclass(frozen=True)
class Rule:
    """When not to trust an answer, and what to do then."""

    score: str
    value: float
    below: bool
    action: Action = Action.FLAG
    route_to: str | None = None

    def abstains(self, scores: Mapping[str, Any]) -> bool | None:
        """Whether these scores are beyond the threshold; None if the score is not known."""
        score = scores.get(self.score)
        if score is None or not math.isfinite(score):
            return None
        return bool(score < self.value if self.below else score > self.value)

    def judged(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """What is told of it: `abstained`, and the `action` that was taken, if any."""
        abstained = self.abstains(scores)
        doubted = abstained if self.action is Action.FLAG else abstained is not False
        return {"abstained": abstained, "action": self.action.value if doubted else None}

    @property
    def reason(self) -> str:
        return f"The answer is not sure: {self.score} is {'below' if self.below else 'above'} {self.value:g}."
