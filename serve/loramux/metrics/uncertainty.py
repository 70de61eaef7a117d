"""How sure answers are, per adapter and mode, and what it takes to tell."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from loramux.metrics.labels import Labels

#: Scores that are shown; each is a set of series per adapter and mode.
SHOWN = ("total", "epistemic", "confidence")
# Nats from what float32 can tell to the entropy of a vocabulary; confidences use the last decade.
_SCORE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1, 2, 4, 8)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class UncertaintyMetrics:
    """The `loramux_uncertainty_*` families. `labels` bounds the number of adapters that have series of their own."""

    def __init__(self, labels: Labels, registry: CollectorRegistry = REGISTRY) -> None:
        self._series = labels.series
        self._score = Histogram(
            "loramux_uncertainty_score",
            "Scores of answers: nats, or a probability (confidence).",
            ["adapter", "mode", "score"],
            buckets=_SCORE,
            registry=registry,
        )
        self._requests = Counter(
            "loramux_uncertainty_requests",
            "Choices whose uncertainty was asked for: complete, partial, error.",
            ["adapter", "mode", "outcome"],
            registry=registry,
        )
        self._abstentions = Counter(
            "loramux_uncertainty_abstentions",
            "Choices that were not sure enough for their request: flag, refuse, route.",
            ["adapter", "action"],
            registry=registry,
        )
        self._seconds = Histogram(
            "loramux_uncertainty_seconds",
            "How long a choice waited for its uncertainty, from when its text was there.",
            ["adapter", "mode"],
            buckets=_SECONDS,
            registry=registry,
        )

        self._tokens = Counter(
            "loramux_uncertainty_tokens",
            "Tokens that were read to tell how sure answers are, beyond those of the answers themselves.",
            ["adapter"],
            registry=registry,
        )

    def read(self, name: str, tokens: int) -> None:
        """Tokens were read for an uncertainty of `name`."""
        self._series(self._tokens, name).inc(tokens)

    def told(self, name: str, value: dict[str, Any], seconds: float) -> None:
        """A choice of `name` has its uncertainty, `seconds` after its text was there."""
        mode = value["mode"]
        outcome = "error" if "error" in value else "partial" if value["partial"] else "complete"
        self._series(self._requests, name, mode, outcome).inc()
        self._series(self._seconds, name, mode).observe(seconds)
        if value.get("action") is not None:
            self._series(self._abstentions, name, value["action"]).inc()
        for score in SHOWN:
            if value.get(score) is not None:
                self._series(self._score, name, mode, score).observe(value[score])
