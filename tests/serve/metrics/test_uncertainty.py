from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from loramux.metrics.labels import Labels
from loramux.metrics.uncertainty import UncertaintyMetrics


def test_outcomes_scores_and_seconds() -> None:
    registry = CollectorRegistry()
    metrics = UncertaintyMetrics(Labels(1), registry)
    value: dict[str, Any] = {"mode": "score", "partial": False, "total": 1.5, "epistemic": 0.02}
    metrics.told("a", value, 0.2)
    metrics.told("a", value | {"partial": True, "epistemic": None, "total": None}, 0.2)
    metrics.told("b", value | {"mode": "fast", "partial": True, "error": {}}, 0.2)  # there is one label

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"loramux_uncertainty_{name}", labels)

    for outcome in ("complete", "partial"):
        assert sample("requests_total", adapter="a", mode="score", outcome=outcome) == 1
    assert sample("requests_total", adapter="other", mode="fast", outcome="error") == 1
    metrics.told("a", value | {"action": "refuse"}, 0.2)
    assert sample("abstentions_total", adapter="a", action="refuse") == 1
    assert sample("seconds_count", adapter="a", mode="score") == 3
    assert sample("score_count", adapter="a", mode="score", score="epistemic") == 2
    assert sample("score_sum", adapter="a", mode="score", score="total") == 3.0
    assert sample("score_count", adapter="a", mode="score", score="confidence") is None
