"""How good confidences are, by the feedback on answers of late, and how far scores are from the calibration's.

Computed when they are asked for, of the version of each adapter that was scored last. Too few answers have no series: a
number that is noise would raise alarms.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import datetime

import numpy as np
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loramux.metrics.labels import Labels
from loramux.uncertainty.calibration import Calibrations, reliability
from loramux.uncertainty.recent import Recent, Window

#: Answers that a reliability, and a drift, is told of.
MIN_LABELLED, MIN_RECENT = 20, 100
#: Of `risk_at_coverage`.
COVERAGES = (0.5, 0.8, 1.0)


class ReliabilityMetrics(Collector):
    """Gauges `loramux_uncertainty_*`; only adapters that have a label have series."""

    def __init__(
        self, labels: Labels, recent: Recent, calibrations: Calibrations, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._labels = labels
        self._recent = recent
        self._calibrations = calibrations
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Called by Prometheus' registry at every scrape, in another thread."""
        held = {*self._labels.held}
        windows = [found for found in self._recent.windows() if found[0] in held]
        yield from _reliability([(name, window) for name, _, window in windows])
        drift = GaugeMetricFamily(
            "loramux_uncertainty_drift_psi",
            "Population stability index of recent scores against those of the calibration.",
            labels=["adapter", "score"],
        )
        age = GaugeMetricFamily(
            "loramux_uncertainty_calibration_age_seconds", "Of the oldest calibration in use.", labels=["adapter"]
        )
        for name, digest, window in windows:
            found: dict[str, float] = {}
            ages = []
            for calibration in self._calibrations.of_content(name, digest) if digest else ():
                ages.append(time.time() - datetime.fromisoformat(calibration.told["created"]).timestamp())
                alike = [one for one in list(window.last) if one.settings == calibration.settings]
                scores = [score for one in alike if (score := one.told.get(calibration.score)) is not None]
                if len(scores) >= MIN_RECENT:
                    psi = calibration.histogram.psi(scores)
                    found[calibration.score] = max(psi, found.get(calibration.score, 0.0))
            for score, psi in found.items():
                drift.add_metric([name, score], psi)
            if ages:
                age.add_metric([name], max(ages))
        yield drift
        yield age


def _reliability(windows: list[tuple[str, Window]]) -> Iterator[Metric]:
    families = {
        name: GaugeMetricFamily(f"loramux_uncertainty_{name}", meaning, labels=["adapter", "mode"])
        for name, meaning in {
            "labelled": "Answers of late that feedback was given on.",
            "ece": "Expected calibration error of confidence, by feedback.",
            "brier": "Mean squared error of confidence, by feedback.",
            "auroc": "Probability that a right answer had the larger confidence of the two, by feedback.",
        }.items()
    }
    risk = GaugeMetricFamily(
        "loramux_uncertainty_risk_at_coverage",
        "Share of wrong answers among the most confident ones, by feedback.",
        labels=["adapter", "mode", "coverage"],
    )
    for name, window in windows:
        labelled = [one for one in list(window.labelled) if one.confidence is not None]
        for mode in dict.fromkeys(one.settings.mode for one in labelled):
            found = [one for one in labelled if one.settings.mode is mode]
            confidence = np.array([one.confidence for one in found], np.float64)
            right = np.array([one.right for one in found], bool)
            families["labelled"].add_metric([name, mode], len(found))
            if len(found) < MIN_LABELLED:
                continue
            families["ece"].add_metric([name, mode], reliability.ece(confidence, right))
            families["brier"].add_metric([name, mode], reliability.brier(confidence, right))
            if (auroc := reliability.auroc(confidence, right)) is not None:
                families["auroc"].add_metric([name, mode], auroc)
            for share in COVERAGES:
                value = reliability.risk_at_coverage(confidence, right, share)
                risk.add_metric([name, mode, f"{share:g}"], value)
    yield from families.values()
    yield risk
