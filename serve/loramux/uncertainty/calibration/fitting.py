"""From labelled items to a calibration.

What it is worth is told by cross-validation: five folds, alike in their share of right answers, each calibrated by the
other four. What serves is fitted to all items. Of several methods the one with the smaller Brier score serves: a
proper score, and finite where a confidence of 1 is wrong.
"""

from __future__ import annotations

import math
import uuid
from datetime import UTC, datetime
from typing import Any

import numpy as np

from loramux.errors import InvalidRequest
from loramux.uncertainty.ask import Mode
from loramux.uncertainty.calibration import conformal, isotonic, platt, reliability, temperature, threshold
from loramux.uncertainty.calibration.calibration import Calibration, Method
from loramux.uncertainty.calibration.conformal import Sets
from loramux.uncertainty.calibration.histogram import Histogram
from loramux.uncertainty.calibration.isotonic import Steps
from loramux.uncertainty.calibration.items import Items
from loramux.uncertainty.calibration.platt import Sigmoid
from loramux.uncertainty.calibration.settings import Settings
from loramux.uncertainty.scores import Array

FOLDS = 5
#: Of the bound on the risk: it holds with a probability of 1 − δ.
DELTA = 0.05


def methods(mode: Mode) -> tuple[Method, ...]:
    """Those there are; a temperature needs the probabilities of labels."""
    return tuple(Method) if mode is Mode.DECIDE else (Method.PLATT, Method.ISOTONIC)


def calibrate(
    items: Items, settings: Settings, *, score: str, method: Method | None, sets: Sets, risk: float
) -> Calibration:
    """The best of all methods if none is given. Raises InvalidRequest for items that nothing can be learned from."""
    items.check()
    if score not in items.scores:
        raise InvalidRequest(
            f"Not all items have a finite {score!r}.",
            hint=f"There are {', '.join(items.scores) or 'none'}.",
            param="score",
        )
    possible = [one for one in methods(settings.mode) if one is not Method.TEMPERATURE or items.p is not None]
    if method is not None and method not in possible:
        raise InvalidRequest(
            "A temperature is for the labels of decisions.",
            hint='Send answers of the mode "decide" with their right label, or "method": "platt".',
            param="method",
        )
    tried = {one: _validated(items, score, one) for one in ([method] if method else possible)}
    best = min(tried, key=lambda one: reliability.brier(tried[one], items.right))
    return Calibration(
        settings,
        best,
        score,
        _fit(items, score, best, np.arange(len(items))),
        _told(items, score, tried, best, risk),
        Histogram.of(items.scores[score]),
        sets,
        _limits(items, sets),
    )


def _fit(items: Items, score: str, method: Method, part: np.ndarray) -> float | Sigmoid | Steps:
    right, x = items.right[part], items.scores[score][part]
    if method is Method.TEMPERATURE:
        assert items.p is not None and items.label is not None
        return temperature.fit(items.p[part], items.label[part])
    return platt.fit(x, right) if method is Method.PLATT else isotonic.fit(x, right)


def _validated(items: Items, score: str, method: Method) -> Array:
    """The confidence of each item by what was fitted without its fold, [n]."""
    confidence, fold = np.zeros(len(items)), _folds(items.right)
    for i in range(FOLDS):
        fitted, out = _fit(items, score, method, np.flatnonzero(fold != i)), fold == i
        if isinstance(fitted, float):
            assert items.p is not None
            confidence[out] = temperature.apply(items.p[out], fitted).max(1)
        else:
            confidence[out] = fitted(items.scores[score][out])
    return confidence


def _folds(right: np.ndarray) -> np.ndarray:
    """Which fold each item is in, the same every time, whatever order they are sorted in."""
    fold, rng = np.zeros(len(right), np.int64), np.random.default_rng(0)
    for kind in (True, False):
        places = rng.permutation(np.flatnonzero(right == kind))
        fold[places] = np.arange(len(places)) % FOLDS
    return fold


def _limits(items: Items, sets: Sets) -> Array | None:
    if items.p is None or items.label is None:
        return None
    return np.sort(conformal.nonconformity(items.p, sets)[np.arange(len(items)), items.label])


def _told(items: Items, score: str, tried: dict[Method, Array], best: Method, risk: float) -> dict[str, Any]:
    after = tried[best]
    before = items.confidence
    return {
        "id": f"cal-{uuid.uuid4().hex[:16]}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "n": len(items),
        "accuracy": float(items.right.mean()),
        "ece": reliability.ece(after, items.right),
        "brier": reliability.brier(after, items.right),
        "evaluated": f"{FOLDS}-fold cross-validation",
        "before": None
        if before is None
        else {
            "ece": reliability.ece(before, items.right),
            "brier": reliability.brier(before, items.right),
        },
        "auroc": reliability.auroc(-items.scores[score], items.right),
        "compared": {method.value: reliability.brier(told, items.right) for method, told in tried.items()},
        "threshold": _threshold(items, score, risk),
    }


def _threshold(items: Items, score: str, risk: float) -> dict[str, Any] | None:
    """A value for `abstain_above` of this score; None if none keeps the risk."""
    found = threshold.find(items.scores[score], items.right, risk=risk, delta=DELTA)
    if found is None:
        return None
    return {
        "score": score,
        "value": found.value if math.isfinite(found.value) else None,  # None: no answer has to be left out
        "risk": risk,
        "delta": DELTA,
        "bound": found.bound,
        "accepted": found.accepted,
        "errors": found.errors,
        "coverage": found.accepted / len(items),
    }
