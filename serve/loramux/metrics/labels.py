"""Which adapters have a label of their own on `/metrics`."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from prometheus_client import Counter, Histogram, Summary

Family = TypeVar("Family", Counter, Histogram, Summary)

#: The label that adapters without one share. An adapter of this name shares it too.
OTHER = "other"

_HALF_LIFE_S = 600.0
_HOLD_S = 300.0


class Labels:
    """At most `limit` adapter names as label values; everything else counts under `other`.

    While a label is free, a name takes it at its first event. Then labels follow traffic: a name takes the label of
    the least used holder once it has had more than twice its requests, where a request counts half after ten
    minutes. A label is held for five minutes at least, and given back five minutes after its adapter is gone, so
    that a scrape sees its last counts.

    When a name loses its label its series end, and what happens to it later counts under `other`; its past is not
    added there, which would look like a burst. So every counter only grows while it is shown, `other` for ever, and a
    series that comes back starts at zero, which Prometheus takes for a restart. Write `sum(rate(…))`, never
    `rate(sum(…))`. Gauges are exact at every scrape: `other` is the sum over the names without a label.

    Thread-safe: events come from the event loop, vLLM answers scrapes in a thread.
    """

    def __init__(self, limit: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[str, float] = {}  # name -> when it got its label
        self._gone: dict[str, float] = {}  # name -> when its adapter went; oldest first
        # Name -> log2 of Σ 2^(t / half-life) over its requests: what differs between names is the decayed count,
        # and no value ever has to be aged.
        self._traffic: dict[str, float] = {}
        self._series: dict[str, dict[tuple[Any, ...], Any]] = {}  # label -> (family, further values) -> child

    def label(self, name: str) -> str:
        """`name` if it has a label or takes a free one, else `other`."""
        with self._lock:
            return self._label(name)

    def series(self, family: Family, name: str, *values: str) -> Family:
        """The child of `family` for this name and its further label values. `adapter` must be the first label."""
        with self._lock:
            label = self._label(name)
            children = self._series.setdefault(label, {})
            key = (family, *values)
            if key not in children:
                children[key] = family.labels(label, *values)
            child: Family = children[key]
            return child

    def by_label(self, amounts: Mapping[str, float]) -> dict[str, float]:
        """Amounts per name summed per label."""
        with self._lock:
            sums: dict[str, float] = defaultdict(float)
            for name, amount in amounts.items():
                sums[name if name in self._held else OTHER] += amount
            return dict(sums)

    @property
    def held(self) -> tuple[str, ...]:
        """The names that have a label."""
        with self._lock:
            return tuple(self._held)

    def requested(self, name: str) -> None:
        """One more request of `name`, which may earn it a label."""
        with self._lock:
            now = self._clock()
            before, this = self._requests_log2(name), now / _HALF_LIFE_S
            larger = max(before, this)
            self._traffic[name] = larger + math.log2(math.exp2(before - larger) + math.exp2(this - larger))
            if self._label(name) == OTHER != name:
                self._compete(name, now)

    def gone(self, name: str) -> None:
        """The adapter does not exist any more."""
        with self._lock:
            self._gone.setdefault(name, self._clock())
        self.expire()

    def back(self, name: str) -> None:
        """The adapter exists (again)."""
        with self._lock:
            self._gone.pop(name, None)

    def expire(self) -> None:
        """Take the labels of adapters that went long enough ago."""
        with self._lock:
            now = self._clock()
            while self._gone:
                name, since = next(iter(self._gone.items()))
                if now - since < _HOLD_S:
                    return
                del self._gone[name]
                self._traffic.pop(name, None)
                self._revoke(name)

    def _label(self, name: str) -> str:
        if name not in self._held:
            if name == OTHER or len(self._held) >= self._limit:
                return OTHER
            self._held[name] = self._clock()
        return name

    def _compete(self, name: str, now: float) -> None:
        ripe = [holder for holder, since in self._held.items() if now - since >= _HOLD_S]
        weakest = min(ripe, key=self._requests_log2, default=None)
        if weakest is not None and self._requests_log2(name) > self._requests_log2(weakest) + 1:
            self._revoke(weakest)
            self._held[name] = now

    def _requests_log2(self, name: str) -> float:
        return self._traffic.get(name, -math.inf)

    def _revoke(self, name: str) -> None:
        self._held.pop(name, None)
        if name != OTHER:
            for family, *values in self._series.pop(name, {}):
                family.remove(name, *values)
