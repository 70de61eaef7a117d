"""Draws from the posterior of a Bayesian adapter: versions like any other, the same whenever they are asked for."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from loramux.errors import AdapterRefused, DrawsDoNotFit
from loramux.registry.entry import Version
from loramux.registry.made import Made
from loramux.registry.protocols import Draw
from loramux.registry.tasks import all_of
from loramux.units import format_bytes
from loramux_adapters import AdapterCorrupt, AdapterError, AdapterNotFound, Artefact

if TYPE_CHECKING:
    from loramux.registry.changes import Changes
    from loramux.registry.residency import Residency

#: The name of all of them, in metrics and before the `@`. No adapter's name begins like that.
DRAWN = "+drawn"
#: More are forgotten, least recently used first, with their artefacts.
KEPT = 256

Key = tuple[str, int, int]  # digest of the mean, seed, sample
Lease = Callable[[Version], Awaitable[None]]


class Draws:
    """Draws by the content they are drawn from, seed and number.

    One adapter's draws are the same for all requests: scores of different requests can be compared, and blocks of the
    KV cache shared.
    """

    def __init__(
        self, draw: Draw, changes: Changes, residency: Residency, *, capacity_bytes: int, kept: int = KEPT
    ) -> None:
        self._draw = draw
        self._changes = changes
        self._residency = residency
        self._capacity_bytes = capacity_bytes
        self._made: Made[Key] = Made(residency, kept=kept)
        # One set at a time: two that each hold half of what they need would wait for each other.
        self._turn = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._made)

    def find(self, tag: str) -> Version | None:
        """The version of this tag."""
        return self._made.find(tag)

    def check_room(self, mean: Version, samples: int) -> None:
        """Raises DrawsDoNotFit if that many draws could not lie on the device beside their mean, which does."""
        size = mean.resident_bytes
        if size and (samples + 1) * size > self._capacity_bytes:
            most = self._capacity_bytes // size - 1
            less = f'Send "samples": {most} or fewer, or restart' if most >= 2 else "Restart"
            raise DrawsDoNotFit(
                f"{samples} draws of {mean.name!r} and their mean need {format_bytes((samples + 1) * size)}, adapter "
                f"memory is {format_bytes(self._capacity_bytes)}.",
                hint=f"{less} the server with a larger --adapter-memory.",
                param="uncertainty.samples",
            )

    @asynccontextmanager
    async def held(self, mean: Version, *, seed: int, samples: int, lease: Lease) -> AsyncIterator[list[Version]]:
        """The first draws of a version that is leased; all of them leased by `lease` until this is left."""
        assert mean.artefact is not None
        artefact = mean.artefact
        async with AsyncExitStack() as held:
            versions = []
            for sample in range(samples):
                new = functools.partial(self._new, artefact, seed, sample)
                versions.append(held.enter_context(self._made.held((artefact.digest, seed, sample), new)))

            async def take(version: Version) -> None:
                await lease(version)
                held.callback(self._residency.release, version)

            async with self._turn:
                await all_of(take(version) for version in versions)
            yield versions

    def _new(self, artefact: Artefact, seed: int, sample: int) -> Version:
        def make() -> Artefact:
            try:
                return self._draw(artefact, seed=seed, sample=sample)
            except (AdapterCorrupt, AdapterNotFound):
                raise AdapterRefused(
                    "The prepared form of the adapter is lost or damaged.",
                    code="adapter_unreadable",
                    hint="Put the adapter again.",
                    param="model",
                ) from None
            except AdapterError as error:
                raise AdapterRefused(error.message, code=error.code, hint=error.hint, param="uncertainty") from None

        version = self._changes.version(DRAWN, artefact.path)
        version.make = make
        return version
