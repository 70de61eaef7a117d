"""Where adapters are and how they got there: states, loads, evictions, leases, memory."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.core import GaugeMetricFamily

from loramux.metrics.gauges import gauge
from loramux.metrics.labels import OTHER, Labels
from loramux.registry import State

_LOAD_S = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300)


class ResidencyMetrics:
    """Families that the registry feeds, as its observer.

    An adapter counts once, with one state: `resident` if any of its versions is, else the state that one of them
    entered last.
    """

    def __init__(self, labels: Labels, registry: CollectorRegistry) -> None:
        self._labels = labels
        self._versions: dict[str, Tally[State]] = {}  # how many versions of a name are in each state
        self._states: dict[str, State] = {}
        self._resident_bytes: dict[str, float] = {}
        self._leases: dict[str, float] = {}
        self._pool: dict[str, Callable[[], float]] = {}
        # Quantiles over all adapters, sums per adapter: buckets times labels would make most of the page.
        self._load = Histogram(
            "loramux_load_seconds",
            "Loading an adapter. Stages: read, verify, copy (to the device, between steps). Tiers: where it came from.",
            ["tier", "stage"],
            buckets=_LOAD_S,
            registry=registry,
        )
        self._load_of = Summary(
            "loramux_adapter_load_seconds",
            "loramux_load_seconds per adapter.",
            ["adapter", "tier", "stage"],
            registry=registry,
        )
        self._failures = Counter(
            "loramux_adapter_load_failures", "Loads refused or failed.", ["adapter", "code"], registry=registry
        )
        self._evictions = Counter(
            "loramux_adapter_evictions", "Evictions to make room for another.", ["adapter"], registry=registry
        )

        self._draw_hits = Counter(
            "loramux_uncertainty_draw_hits", "Draws that lay on the device when needed.", ["adapter"], registry=registry
        )
        self._draw_misses = Counter(
            "loramux_uncertainty_draw_misses", "Draws that had to be made or loaded.", ["adapter"], registry=registry
        )

    def moved(self, name: str, old: State | None, new: State) -> None:
        """A version of `name` went from one state to another; `old` is None for a new version."""
        versions = self._versions.get(name, Tally())
        if old is not None:
            versions[old] -= 1
        if new is not State.GONE:
            versions[new] += 1
        versions = +versions
        if not versions:
            self._versions.pop(name, None)
            self._states.pop(name, None)
            self._labels.gone(name)
            return
        entered = new if new in versions else next(iter(versions))
        self._versions[name] = versions
        self._states[name] = State.RESIDENT if State.RESIDENT in versions else entered
        self._labels.back(name)

    def loaded(self, name: str, tier: str, stages: Mapping[str, float], resident_bytes: int) -> None:
        """`tier`: `source` (read, verified, copied) or `host` (the artefact was there: copied only)."""
        for stage, seconds in stages.items():
            self._load.labels(tier, stage).observe(seconds)
            self._labels.series(self._load_of, name, tier, stage).observe(seconds)
        self._resident_bytes[name] = resident_bytes

    def load_failed(self, name: str, code: str) -> None:
        self._labels.series(self._failures, name, code).inc()

    def drawn(self, name: str, hits: int, misses: int) -> None:
        self._labels.series(self._draw_hits, name).inc(hits)
        self._labels.series(self._draw_misses, name).inc(misses)

    def evicted(self, name: str) -> None:
        self._labels.series(self._evictions, name).inc()

    def unloaded(self, name: str) -> None:
        """No version of `name` is on the device any more."""
        self._resident_bytes.pop(name, None)

    def leases(self, name: str, count: int) -> None:
        if count:
            self._leases[name] = count
        else:
            self._leases.pop(name, None)

    def watch_pool(self, capacity_bytes: int, used_bytes: Callable[[], int], overhead_bytes: int = 0) -> None:
        """`used_bytes` is asked at every scrape; the overhead is what the pool takes beside its capacity."""
        self._pool = {"capacity": lambda: capacity_bytes, "used": used_bytes, "overhead": lambda: overhead_bytes}

    def residency_gauges(self) -> Iterator[GaugeMetricFamily]:
        """From copies: a scrape runs in another thread."""
        states, labels = self._states.copy(), self._labels
        count = Tally(states.values())
        yield gauge("loramux_adapters", "Adapters by state.", "state", {state: count[state] for state in State})

        known = [name for name in labels.held if name in states]
        one_hot = GaugeMetricFamily("loramux_adapter_state", "1 for an adapter's state.", labels=["adapter", "state"])
        for name in known:
            one_hot.add_metric([name, states[name]], 1)
        yield one_hot

        leases = dict.fromkeys([*known, OTHER], 0.0) | labels.by_label(self._leases.copy())
        yield gauge("loramux_adapter_leases", "Requests that hold an adapter.", "adapter", leases)
        nbytes = labels.by_label(self._resident_bytes.copy())
        yield gauge("loramux_adapter_resident_bytes", "Device bytes of the newest version.", "adapter", nbytes)
        pool = {kind: measure() for kind, measure in self._pool.items()}
        yield gauge("loramux_adapter_pool_bytes", "Adapter memory, and the tables beside it.", "kind", pool)
