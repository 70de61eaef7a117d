"""What was fitted, where it holds, how good it is; and an answer with it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from loramux.uncertainty.ask import Mode
from loramux.uncertainty.calibration import conformal, temperature
from loramux.uncertainty.calibration.conformal import Sets
from loramux.uncertainty.calibration.histogram import Histogram
from loramux.uncertainty.calibration.isotonic import Steps
from loramux.uncertainty.calibration.platt import Sigmoid
from loramux.uncertainty.calibration.settings import Settings
from loramux.uncertainty.scores import Array


class Method(StrEnum):
    TEMPERATURE = "temperature"
    PLATT = "platt"
    ISOTONIC = "isotonic"


@dataclass(frozen=True)
class Calibration:
    """Of one adapter version under one set of settings.

    score     what `map` is a function of; of a temperature, what only the threshold looks at
    histogram how `score` was spread
    told      what is known of it: id, n, created, ece and brier before and after, threshold; as JSON
    limits    scores s(x_i, y_i) of the calibration items, sorted: what sets of labels are made with
    """

    settings: Settings
    method: Method
    score: str
    map: float | Sigmoid | Steps
    told: dict[str, Any]
    histogram: Histogram
    sets: Sets = Sets.LAC
    limits: Array | None = None

    @property
    def id(self) -> str:
        return str(self.told["id"])

    def card(self) -> dict[str, Any]:
        """What the API tells of it."""
        shown = {**self.told, "method": self.method.value, "score": self.score, "settings": self.settings.as_json()}
        if isinstance(self.map, float):
            shown["temperature"] = self.map
        if self.limits is not None:
            shown["sets"] = self.sets.value
        return shown

    def short(self) -> dict[str, Any]:
        """What an answer tells of it."""
        return {"id": self.id, "method": self.method.value, "n": self.told["n"], "ece": self.told["ece"]}

    def applied(self, told: Mapping[str, Any], alpha: float | None) -> dict[str, Any] | None:
        """The field `uncertainty` of an answer under these settings, calibrated; None if it lacks the score."""
        result = dict(told)
        if isinstance(self.map, float):
            p = temperature.apply(_probabilities(told), self.map)
            result["labels"] = [{**entry, "probability": float(q)} for entry, q in zip(told["labels"], p, strict=True)]
            confidence = float(p.max())
        elif (x := told.get(self.score)) is None or not math.isfinite(x):
            return None
        else:
            confidence = float(self.map(np.array([x]))[0])
        result["confidence"] = confidence
        result["raw"] = {**told.get("raw", {}), "confidence": told["confidence"]}
        result["calibration"] = self.short()
        if alpha is not None and self.limits is not None:
            limit = conformal.limit(self.limits, alpha)
            places = conformal.prediction_set(_probabilities(told), limit, self.sets)
            labels = [told["labels"][place]["label"] for place in places]
            result["prediction_set"] = {"alpha": alpha, "labels": labels}
        return result

    def dumped(self) -> str:
        """As text that `loaded` reads."""
        fitted: Any = self.map
        if isinstance(fitted, Sigmoid):
            fitted = {"a": fitted.a, "b": fitted.b, "centre": fitted.centre, "scale": fitted.scale}
        elif isinstance(fitted, Steps):
            fitted = {"x": fitted.x.tolist(), "y": fitted.y.tolist()}
        return json.dumps(
            {
                "settings": self.settings.as_json(),
                "method": self.method.value,
                "score": self.score,
                "map": fitted,
                "told": self.told,
                "histogram": {"edges": self.histogram.edges, "counts": self.histogram.counts},
                "sets": self.sets.value,
                "limits": None if self.limits is None else self.limits.tolist(),
            },
            allow_nan=False,
        )


@functools.lru_cache(maxsize=1024)
def loaded(text: str) -> Calibration:
    """What `dumped` wrote."""
    value = json.loads(text)
    settings, fitted, limits = value["settings"], value["map"], value["limits"]
    if value["method"] == Method.PLATT:
        fitted = Sigmoid(**fitted)
    elif value["method"] == Method.ISOTONIC:
        fitted = Steps(np.array(fitted["x"]), np.array(fitted["y"]))
    return Calibration(
        Settings(**{**settings, "mode": Mode(settings["mode"]), "labels": tuple(settings.get("labels", ()))}),
        Method(value["method"]),
        value["score"],
        fitted,
        value["told"],
        Histogram(*(tuple(value["histogram"][name]) for name in ("edges", "counts"))),
        Sets(value["sets"]),
        None if limits is None else np.array(limits),
    )


def _probabilities(told: Mapping[str, Any]) -> Array:
    return np.array([entry["probability"] for entry in told["labels"]], np.float64)
