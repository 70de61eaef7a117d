"""What surrounds the registry: the reader, the device, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loramux_adapters import Artefact, Posterior
from loramux_adapters.compose.prepared import Part, Router

if TYPE_CHECKING:
    from loramux.registry.entry import State


class Prepare(Protocol):
    """Reads, checks and lowers a source; runs in a worker thread."""

    def __call__(self, source: Path, *, on_read: Callable[[], object] = ...) -> Artefact:
        """Calls `on_read` once everything is read. Raises AdapterError, or OSError for the cache."""


class Compose(Protocol):
    """Makes the weighted sum of prepared adapters, or a router over them; runs in a worker thread."""

    def __call__(self, parts: Sequence[Part], router: Router | None = ...) -> Artefact:
        """Raises AdapterError, or OSError for the cache."""


class Posteriors(Protocol):
    """Of prepared Bayesian adapters; all methods run in worker threads, and raise AdapterError or OSError."""

    max_rank: int  # the largest that is served

    def describe(self, artefact: Artefact) -> Posterior | None:
        """What its posterior is; None if it has none."""

    def draw_bytes(self, artefact: Artefact) -> int:
        """Bytes on the device of one draw beside its mean, at most."""

    def draw(self, artefact: Artefact, *, seed: int, sample: int) -> Artefact:
        """One draw from it."""


class DataPlane(Protocol):
    """The device side of an adapter version."""

    async def load(self, version_id: int, artefact: Artefact, lender: int | None = None) -> int:
        """Copy an artefact into the pool, between engine steps; returns its bytes there.

        What is the same in the version `lender` it may borrow, and not count: the lender is unloaded after it.

        Raises PoolExhausted, AdapterRefused (`adapter_unreadable` when the artefact is damaged); then nothing of it
        is left on the device.
        """

    async def unload(self, version_id: int) -> None:
        """Free what `load` took. Only for versions no request uses."""


class Observer(Protocol):
    """Told what happens to adapters, for metrics."""

    def moved(self, name: str, old: State | None, new: State) -> None:
        """A version of `name` changed its state; `old` is None for a new one, and every one ends as GONE."""

    def loaded(self, name: str, tier: str, stages: Mapping[str, float], resident_bytes: int) -> None:
        """A version is resident. `tier`: `source` (stages read, verify, copy) or `host` (copy alone); seconds."""

    def load_failed(self, name: str, code: str) -> None: ...

    def evicted(self, name: str) -> None:
        """A version left the device to make room for another."""

    def unloaded(self, name: str) -> None:
        """No version of `name` is on the device any more."""

    def leases(self, name: str, count: int) -> None:
        """Running requests of `name`, all versions."""

    def drawn(self, name: str, hits: int, misses: int) -> None:
        """A request needed draws of `name`; so many lay on the device, and so many had to be made or loaded."""

    def waited(self, name: str, seconds: float) -> None:
        """A request waited for its adapter before it entered the engine."""
