"""Gauges by feedback and of drift, over answers whose reliability is known."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from loramux.metrics.labels import Labels
from loramux.metrics.reliability import ReliabilityMetrics
from loramux.uncertainty.ask import Mode
from loramux.uncertainty.calibration import Calibrations, Method, Sets, Settings, calibrate, of_scores
from loramux.uncertainty.recent import Recent

from ..fakes import World


class Bench:
    def __init__(self, most: int = 10) -> None:
        self.world, self.recent, self.registry, self.labels = World(), Recent(), CollectorRegistry(), Labels(most)
        self.calibrations = Calibrations(self.world.store)
        ReliabilityMetrics(self.labels, self.recent, self.calibrations, self.registry)

    def answer(self, name: str, digest: str | None, nll: float, confidence: float, right: bool | None) -> None:
        self.labels.label(name)
        told = {"mode": "score", "noise": "sequence", "samples": 8, "seed": 0, "partial": False, "nll_ln": nll}
        one = self.recent.add(name, digest, told, (), confidence)
        assert one is not None
        if right is not None:
            self.recent.call(one, ["r"], 0)
            self.recent.feedback("r", 0, [name], correct=right, label=None)

    def gauge(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"loramux_uncertainty_{name}", labels)


def test_reliability_by_feedback() -> None:
    """Half of the answers sure by 0.9 and right in 8 of 10, half by 0.3 and right in 2 of 10."""
    bench = Bench()
    for i in range(19):
        bench.answer("a", "d", 0.5, 0.9 if i % 2 else 0.3, i // 2 % 10 < (8 if i % 2 else 2))
    assert (
        bench.gauge("labelled", adapter="a", mode="score") == 19
        and bench.gauge("ece", adapter="a", mode="score") is None
    )
    for i in range(19, 100):
        bench.answer("a", "d", 0.5, 0.9 if i % 2 else 0.3, i // 2 % 10 < (8 if i % 2 else 2))
    assert bench.gauge("ece", adapter="a", mode="score") == pytest.approx(0.1)
    assert bench.gauge("brier", adapter="a", mode="score") == pytest.approx(
        (0.8 * 0.01 + 0.2 * 0.81 + 0.2 * 0.49 + 0.8 * 0.09) / 2
    )
    assert bench.gauge("auroc", adapter="a", mode="score") == pytest.approx(0.64 + (0.16 + 0.16) / 2)
    risks = {c: bench.gauge("risk_at_coverage", adapter="a", mode="score", coverage=c) for c in ("0.5", "1")}
    assert risks == pytest.approx({"0.5": 0.2, "1": 0.5})
    bench.answer("a", "new", 0.5, 0.9, True)  # the next version begins anew
    assert bench.gauge("labelled", adapter="a", mode="score") == 1


def test_who_has_no_label_has_no_series() -> None:
    bench = Bench(most=1)
    for name in ("a", "b"):
        for i in range(30):
            bench.answer(name, "d", 0.5, 0.9, i % 2 == 0)
    assert bench.gauge("ece", adapter="a", mode="score") is not None
    assert bench.gauge("ece", adapter="b", mode="score") is None


async def test_drift() -> None:
    bench = Bench()
    version = await bench.world.load("a")
    assert version.artefact is not None
    rng = np.random.default_rng(0)
    x = rng.exponential(0.2, 500)
    items = of_scores("nll_ln", x.tolist(), (rng.random(500) < np.exp(-x)).tolist())
    settings = Settings(Mode.SCORE, "sequence", 8, 0)
    asked: dict[str, Any] = {"score": "nll_ln", "method": Method.PLATT, "sets": Sets.LAC, "risk": 0.1}
    await bench.calibrations.keep(version, calibrate(items, settings, **asked))
    digest, choice = version.artefact.digest, random.Random(0)
    for _ in range(99):
        bench.answer("a", digest, choice.expovariate(5), 0.5, None)
    assert bench.gauge("drift_psi", adapter="a", score="nll_ln") is None  # too few
    for _ in range(101):
        bench.answer("a", digest, choice.expovariate(5), 0.5, None)
    calm = bench.gauge("drift_psi", adapter="a", score="nll_ln")
    for _ in range(200):
        bench.answer("a", digest, choice.expovariate(2), 0.5, None)
    moved = bench.gauge("drift_psi", adapter="a", score="nll_ln")
    assert calm is not None and moved is not None and calm < 0.25 < moved
    age = bench.gauge("calibration_age_seconds", adapter="a")
    assert age is not None and -1 <= age < 60
