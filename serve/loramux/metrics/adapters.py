"""The metrics: one labelled family per question an operator asks about an adapter."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_LOAD_S = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300)


class AdapterMetrics:
    """`loramux_*` families, labelled by adapter name; the base model has its own name as label.

    Names beyond `max_names` share the label `other`: thousands of adapters must not make `/metrics` unreadable.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, max_names: int = 200) -> None:
        self._names: set[str] = set()
        self._max_names = max_names
        self._requests = Counter(
            "loramux_requests", "Requests ended, by outcome.", ["adapter", "outcome"], registry=registry
        )
        self._in_flight = Gauge("loramux_requests_in_flight", "Requests in the engine.", ["adapter"], registry=registry)
        self._prompt_tokens = Counter(
            "loramux_prompt_tokens", "Prompt tokens received.", ["adapter"], registry=registry
        )
        self._generation_tokens = Counter(
            "loramux_generation_tokens", "Tokens generated.", ["adapter"], registry=registry
        )
        self._first_token = Histogram(
            "loramux_time_to_first_token_seconds",
            "From entering the engine to the first token.",
            ["adapter"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self._inter_token = Histogram(
            "loramux_inter_token_latency_seconds",
            "Between two outputs of one request, per token.",
            ["adapter"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self._load = Histogram(
            "loramux_adapter_load_seconds",
            "Loading an adapter: prepare = read, check, lower; copy = into device memory between steps.",
            ["adapter", "stage"],
            buckets=_LOAD_S,
            registry=registry,
        )
        self._load_failures = Counter(
            "loramux_adapter_load_failures", "Loads refused or failed.", ["adapter", "code"], registry=registry
        )
        self._resident_bytes = Gauge(
            "loramux_adapter_resident_bytes", "Device bytes of a resident adapter.", ["adapter"], registry=registry
        )
        self._pool_bytes = Gauge(
            "loramux_adapter_pool_bytes", "Adapter memory: capacity and use.", ["kind"], registry=registry
        )

    def label(self, name: str) -> str:
        """`name`, or `other` once the label budget is spent."""
        if name in self._names:
            return name
        if len(self._names) >= self._max_names:
            return "other"
        self._names.add(name)
        return name

    def request_started(self, name: str) -> None:
        self._in_flight.labels(self.label(name)).inc()

    def request_ended(self, name: str, outcome: str, prompt_tokens: int, generation_tokens: int) -> None:
        """`outcome`: the finish reason (stop, length, …), `abort` if the client left, `error` if it failed."""
        label = self.label(name)
        self._in_flight.labels(label).dec()
        self._requests.labels(label, outcome).inc()
        self._prompt_tokens.labels(label).inc(prompt_tokens)
        self._generation_tokens.labels(label).inc(generation_tokens)

    def first_token(self, name: str, seconds: float) -> None:
        self._first_token.labels(self.label(name)).observe(seconds)

    def tokens(self, name: str, seconds: float, count: int) -> None:
        """`count` tokens arrived `seconds` after the output before them."""
        self._inter_token.labels(self.label(name)).observe(seconds / count)

    def loaded(self, name: str, stages: dict[str, float], resident_bytes: int) -> None:
        label = self.label(name)
        for stage, seconds in stages.items():
            self._load.labels(label, stage).observe(seconds)
        if label == name:
            self._resident_bytes.labels(label).set(resident_bytes)

    def load_failed(self, name: str, code: str) -> None:
        self._load_failures.labels(self.label(name), code).inc()

    def unloaded(self, name: str) -> None:
        if self.label(name) == name:
            self._resident_bytes.remove(name)

    def watch_pool(self, capacity_bytes: int, used_bytes: Callable[[], int]) -> None:
        """`used_bytes` is asked at every scrape."""
        self._pool_bytes.labels("capacity").set(capacity_bytes)
        self._pool_bytes.labels("used").set_function(used_bytes)
