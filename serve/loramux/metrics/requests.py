"""What requests did: outcomes, tokens, and every time a client waits for."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily

from loramux.metrics.gauges import gauge
from loramux.metrics.labels import OTHER, Labels

_FIRST_TOKEN_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_INTER_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_WAIT_S = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30)


class RequestMetrics:
    """Families per adapter that requests feed; the base model has its own name as label."""

    def __init__(self, labels: Labels, registry: CollectorRegistry) -> None:
        self._labels = labels
        self._in_flight: Tally[str] = Tally()

        def counter(name: str, meaning: str, *more: str) -> Counter:
            return Counter(name, meaning, ["adapter", *more], registry=registry)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, meaning, ["adapter"], buckets=buckets, registry=registry)

        self._requests = counter("loramux_requests", "Requests ended, by outcome.", "outcome")
        self._prompt_tokens = counter("loramux_prompt_tokens", "Prompt tokens received.")
        self._generation_tokens = counter("loramux_generation_tokens", "Tokens generated.")
        self._first_token = histogram(
            "loramux_time_to_first_token_seconds", "From entering the engine to the first token.", _FIRST_TOKEN_S
        )
        self._inter_token = histogram(
            "loramux_inter_token_latency_seconds", "Between two outputs of one request, per token.", _INTER_TOKEN_S
        )
        self._queue = histogram(
            "loramux_queue_time_seconds", "From entering the engine to the first step with the request.", _WAIT_S
        )
        self._wait = histogram(
            "loramux_load_wait_seconds",
            "Waiting for an adapter to load; only requests that waited.",
            _WAIT_S,
        )

    def request_started(self, name: str) -> None:
        self._labels.requested(name)
        self._in_flight[name] += 1

    def request_ended(self, name: str, outcome: str, prompt_tokens: int, generation_tokens: int) -> None:
        """`outcome`: the finish reason (stop, length, …), `abort` if the client left, `error` if it failed."""
        self._in_flight[name] -= 1
        if not self._in_flight[name]:
            del self._in_flight[name]
        self._labels.series(self._requests, name, outcome).inc()
        self._labels.series(self._prompt_tokens, name).inc(prompt_tokens)
        self._labels.series(self._generation_tokens, name).inc(generation_tokens)

    def waited(self, name: str, seconds: float) -> None:
        """A request waited for its adapter before it entered the engine."""
        self._labels.series(self._wait, name).observe(seconds)

    def queued(self, name: str, seconds: float) -> None:
        """A request was scheduled `seconds` after it entered the engine."""
        self._labels.series(self._queue, name).observe(seconds)

    def first_token(self, name: str, seconds: float) -> None:
        self._labels.series(self._first_token, name).observe(seconds)

    def tokens(self, name: str, seconds: float, count: int) -> None:
        """`count` tokens arrived `seconds` after the output before them."""
        self._labels.series(self._inter_token, name).observe(seconds / count)

    def request_gauges(self) -> Iterator[GaugeMetricFamily]:
        """From a copy: a scrape runs in another thread."""
        running = self._labels.by_label(self._in_flight.copy())
        yield gauge(
            "loramux_requests_in_flight",
            "Requests in the engine.",
            "adapter",
            dict.fromkeys([*self._labels.held, OTHER], 0.0) | running,
        )
