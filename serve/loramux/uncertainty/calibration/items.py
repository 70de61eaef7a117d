"""Labelled items: what was told of an answer, and whether it was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loramux.errors import InvalidRequest
from loramux.uncertainty.ask import is_number
from loramux.uncertainty.calibration.settings import Settings, inputs
from loramux.uncertainty.scores import Array

#: Fewer tell nothing; of both kinds there must be some in every fold.
MIN_ITEMS, MIN_OF_EACH, MAX_ITEMS = 30, 5, 10_000
_HINT = "Label more answers of what the adapter is really asked."


@dataclass(frozen=True, eq=False)
class Items:
    """n of them. `p` [n, K] and `label` [n] are there for decisions, by the labels of the settings."""

    right: np.ndarray  # [n] bool
    scores: dict[str, Array]  # [n] of each score that all items have
    confidence: Array | None = None  # [n], as it is told without calibration
    p: Array | None = None
    label: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.right)

    def check(self) -> None:
        """Raises InvalidRequest if nothing can be learned from them."""
        n, ones = len(self.right), int(self.right.sum())
        if n < MIN_ITEMS:
            raise _too_few(n)
        if min(ones, n - ones) < MIN_OF_EACH:
            raise InvalidRequest(
                f"{ones} of {n} answers are right: there must be {MIN_OF_EACH} right and {MIN_OF_EACH} wrong ones.",
                hint=_HINT,
                param="data",
            )


def of_scores(score: str, values: Sequence[float], right: Sequence[bool]) -> Items:
    """Items of which one score is known."""
    x = np.array(values, np.float64)
    confidence = np.exp(-x) if score == "nll_ln" and (x >= 0).all() else None
    return Items(np.array(right, bool), {score: x}, confidence)


def of_answers(told: Sequence[Mapping[str, Any]], settings: Settings, right: Sequence[bool | str]) -> Items:
    """Items of whole fields `uncertainty`, told without calibration; `right` is the right label of a decision.

    Raises InvalidRequest, which names the item, for a field that is not of these settings or lacks its scores.
    """
    if len(told) < MIN_ITEMS:
        raise _too_few(len(told))
    for place, one in enumerate(told):
        _check(one, settings, place)
    names = [name for name in inputs(settings.mode) if all(is_number(one.get(name)) for one in told)]
    scores = {name: np.array([one[name] for one in told], np.float64) for name in names}
    confidence = np.array([one["confidence"] for one in told], np.float64)
    if not settings.labels:
        return Items(np.array(right, bool), scores, confidence)
    p = np.array([[_probabilities(one)[label] for label in settings.labels] for one in told])
    label = np.array([settings.labels.index(str(one)) for one in right])
    return Items(p.argmax(1) == label, scores, confidence, p / p.sum(1, keepdims=True), label)


def _too_few(n: int) -> InvalidRequest:
    return InvalidRequest(f"{n} items are less than {MIN_ITEMS}.", hint=_HINT, param="data")


def _check(told: Mapping[str, Any], settings: Settings, place: int) -> None:
    where = f"data[{place}]"
    try:
        found = _probabilities(told) if told["mode"] == "decide" else {}
        same = Settings.of(told, list(found)) == settings
        good = is_number(told["confidence"]) and all(is_number(p) and 0 <= p <= 1 for p in found.values())
        good = good and (not found or sum(found.values()) > 0) and told.get("partial") is False
    except (KeyError, TypeError, ValueError):
        same = good = False
    if not same:
        raise InvalidRequest(
            "This answer was scored under other settings.",
            hint=f"These are {settings.as_json()}: mode, samples, seed and labels must be the same.",
            param=where,
        )
    if not good:
        raise InvalidRequest(
            "This answer's scores are not all there, or not finite.", hint="Leave it out, or ask again.", param=where
        )
    if "calibration" in told:
        raise InvalidRequest(
            "This answer's confidence is calibrated already.",
            hint='Ask with "calibrated": false for answers to calibrate with.',
            param=where,
        )


def _probabilities(told: Mapping[str, Any]) -> dict[str, Any]:
    return {entry["label"]: entry["probability"] for entry in told["labels"]}
