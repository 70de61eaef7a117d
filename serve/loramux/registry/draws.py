"""Draws from the posterior of a Bayesian adapter: versions like any other, the same whenever they are asked for."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from loramux.errors import DrawsDoNotFit, InvalidRequest
from loramux.registry.entry import Version
from loramux.registry.failures import as_loramux_error, made_of
from loramux.registry.made import Made
from loramux.registry.protocols import Posteriors
from loramux.registry.tasks import all_of
from loramux.units import format_bytes
from loramux_adapters import AdapterError, Artefact, Posterior

if TYPE_CHECKING:
    from loramux.registry.changes import Changes
    from loramux.registry.residency import Residency

#: The name of all of them, in metrics and before the `@`. No adapter's name begins like that.
DRAWN = "+drawn"
#: More are forgotten, least recently used first, with their artefacts.
KEPT = 256

#: Draws of a request that does not say how many, and the most it may ask for.
SAMPLES, MAX_SAMPLES = 8, 64
_DESCRIBED = 1024

Key = tuple[str, int, int]  # digest of the mean, seed, sample
Described = tuple[Posterior, int]  # and the bytes of a draw on the device
Lease = Callable[[Version], Awaitable[None]]


class Draws:
    """Draws by the content they are drawn from, seed and number.

    One adapter's draws are the same for all requests: scores of different requests can be compared, and blocks of the
    KV cache shared.
    """

    def __init__(
        self, posteriors: Posteriors, changes: Changes, residency: Residency, *, capacity_bytes: int, kept: int = KEPT
    ) -> None:
        self._made: Made[Key] = Made(residency, kept=kept)
        self._posteriors = posteriors
        self._described: dict[str, Described] = {}  # by digest, the last that were asked for
        self._changes = changes
        self._residency = residency
        self._capacity_bytes = capacity_bytes
        # One set at a time: two that each hold half of what they need would wait for each other.
        self._turn = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._made)

    def find(self, tag: str) -> Version | None:
        """The version of this tag."""
        return self._made.find(tag)

    async def samples(self, mean: Version, asked: int | None) -> int:
        """See `AdapterRegistry.samples`."""
        posterior, draw_bytes = await self._describe(mean)
        most = MAX_SAMPLES if posterior.samples is None else posterior.samples
        if asked is not None and asked > most:
            raise InvalidRequest(
                f"{mean.name!r} has {most} different draws: {posterior.family}.",
                hint=f'Send "samples": {most} or fewer.',
                param="uncertainty.samples",
            )
        samples = min(SAMPLES, most) if asked is None else asked
        self._check_room(mean, posterior.draw_rank, draw_bytes, samples)
        return samples

    def warnings(self, mean: Version) -> tuple[str, ...]:
        """See `AdapterRegistry.draw_warnings`."""
        found = self._described.get(mean.artefact.digest) if mean.artefact is not None else None
        return found[0].warnings if found is not None else ()

    async def _describe(self, mean: Version) -> Described:
        assert mean.artefact is not None
        digest = mean.artefact.digest
        if (found := self._described.pop(digest, None)) is None:
            try:
                found = await asyncio.to_thread(self._read, mean.artefact)
            except (AdapterError, OSError) as error:
                raise as_loramux_error(error, mean.source) from None
        self._described[digest] = found
        while len(self._described) > _DESCRIBED:
            del self._described[next(iter(self._described))]
        return found

    def _read(self, artefact: Artefact) -> Described:
        posterior = self._posteriors.describe(artefact)
        assert posterior is not None
        return posterior, self._posteriors.draw_bytes(artefact)

    def _check_room(self, mean: Version, rank: int, draw: int, samples: int) -> None:
        if rank > self._posteriors.max_rank:
            raise DrawsDoNotFit(
                f"A draw of {mean.name!r} has rank {rank}; the largest that is served is {self._posteriors.max_rank}.",
                hint=f"Restart the server with --max-lora-rank {rank}.",
                param="uncertainty",
            )
        size = mean.resident_bytes
        if draw and samples * draw + size > self._capacity_bytes:
            most = (self._capacity_bytes - size) // draw
            less = f'Send "samples": {most} or fewer, or restart' if most >= 2 else "Restart"
            raise DrawsDoNotFit(
                f"{samples} draws of {mean.name!r} and their mean need {format_bytes(samples * draw + size)}, adapter "
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
                version = held.enter_context(self._made.held((artefact.digest, seed, sample), new))
                version.lender = mean  # or another adapter's, with the same content
                versions.append(version)

            async def take(version: Version) -> None:
                await lease(version)
                held.callback(self._residency.release, version)

            async with self._turn:
                await all_of(take(version) for version in versions)
            yield versions

    def _new(self, artefact: Artefact, seed: int, sample: int) -> Version:
        def make() -> Artefact:
            with made_of("the adapter", hint="Put the adapter again.", lost="model", refused="uncertainty"):
                return self._posteriors.draw(artefact, seed=seed, sample=sample)

        version = self._changes.version(DRAWN, artefact.path)
        version.make = make
        return version
