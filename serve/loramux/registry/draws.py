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
        self._described: dict[str, Posterior] = {}  # by digest, the last that were asked for
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
        posterior = await self._describe(mean)
        most = MAX_SAMPLES if posterior.samples is None else posterior.samples
        if asked is not None and asked > most:
            raise InvalidRequest(
                f"{mean.name!r} has {most} different draws: {posterior.family}.",
                hint=f'Send "samples": {most} or fewer.',
                param="uncertainty.samples",
            )
        samples = min(SAMPLES, most) if asked is None else asked
        self._check_room(mean, posterior, samples)
        return samples

    async def _describe(self, mean: Version) -> Posterior:
        assert mean.artefact is not None
        digest = mean.artefact.digest
        if (found := self._described.pop(digest, None)) is None:
            try:
                found = await asyncio.to_thread(self._posteriors.describe, mean.artefact)
            except (AdapterError, OSError) as error:
                raise as_loramux_error(error, mean.source) from None
            assert found is not None
        self._described[digest] = found
        while len(self._described) > _DESCRIBED:
            del self._described[next(iter(self._described))]
        return found

    def _check_room(self, mean: Version, posterior: Posterior, samples: int) -> None:
        assert mean.artefact is not None
        if posterior.draw_rank > self._posteriors.max_rank:
            raise DrawsDoNotFit(
                f"A draw of {mean.name!r} has rank {posterior.draw_rank}; the largest that is served is "
                f"{self._posteriors.max_rank}.",
                hint=f"Restart the server with --max-lora-rank {posterior.draw_rank}.",
                param="uncertainty",
            )
        size = mean.resident_bytes
        draw = size * posterior.draw_bytes / max(mean.artefact.summary.nbytes, 1)  # in the pool's dtype, as the mean
        if draw and samples * draw + size > self._capacity_bytes:
            most = int((self._capacity_bytes - size) / draw)
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
                versions.append(held.enter_context(self._made.held((artefact.digest, seed, sample), new)))

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
