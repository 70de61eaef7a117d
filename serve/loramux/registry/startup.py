"""What the server has when it starts: adapters of the command line, and those of the state file."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loramux.errors import LoramuxError, PoolExhausted
from loramux.registry.catalogue import Catalogue
from loramux.registry.changes import Changes, always
from loramux.registry.entry import Adapter, State, Version
from loramux.registry.reader import Reader
from loramux.registry.residency import Residency
from loramux.registry.store import Saved, Store
from loramux_adapters import Artefact

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """An adapter that the command line names.

    required  its failure ends the start
    settle    the server is ready only when it is loaded or has failed
    artefact  what its source contains, if that was just read
    """

    source: Path
    required: bool = False
    settle: bool = True
    artefact: Artefact | None = None


class Startup:
    """The command line's adapters win over those of the state file that have the same names."""

    def __init__(
        self, catalogue: Catalogue, changes: Changes, reader: Reader, residency: Residency, store: Store
    ) -> None:
        self._catalogue = catalogue
        self._changes = changes
        self._reader = reader
        self._residency = residency
        self._store = store

    async def restore(self, given: Mapping[str, Given]) -> None:
        """Know every name; read and load nothing. A change that a crash interrupted begins again."""
        saved, artefacts, recalled = await asyncio.to_thread(self._look_up, given)
        for name, one in given.items():
            self._catalogue[name] = self._given(name, one, recalled[name], saved.pop(name, None), artefacts)
        for name, row in saved.items():
            if row.given and row.pending_source is None:
                await asyncio.to_thread(self._store.delete, name)  # the command line names it no longer
            else:
                self._catalogue[name] = self._saved(row, artefacts)

    async def resume(self) -> None:
        """Carry out the changes that were accepted before a crash and not finished."""
        for row in await asyncio.to_thread(self._store.adapters):
            if row.pending_source is None or row.name not in self._catalogue:
                continue
            try:
                await (
                    await self._changes.put(
                        row.name, Path(row.pending_source), pinned=None, condition=always, turn_s=None
                    )
                )
            except LoramuxError as error:
                logger.warning("adapter %s keeps its version: %s", row.name, error)

    async def settle(self, given: Mapping[str, Given]) -> None:
        """Load what has to be there before the server is ready. Raises what keeps a required one from it."""
        first = [name for name, one in given.items() if one.required]
        pinned = [adapter.name for adapter in self._catalogue.values() if adapter.pinned]
        rest = [name for name, one in given.items() if one.settle]
        for name in dict.fromkeys([*first, *pinned, *rest]):
            adapter = self._catalogue[name]
            error = await self._load(adapter.current)
            if error is not None and name in first:
                raise error.with_traceback(None)
            if isinstance(error, PoolExhausted) and not adapter.pinned:
                return

    async def warm_up(self) -> None:
        """Read all the others, and load them while there is room that nobody needs."""
        room = True
        for adapter in list(self._catalogue.values()):
            version = adapter.current
            if version.retired or version.state is State.FAILED:
                continue
            began = time.monotonic()
            error = await self._load(version) if room else await self._read(version)
            room = room and not isinstance(error, PoolExhausted)
            # Reading competes with requests for the interpreter: half of the time is theirs alone.
            await asyncio.sleep(min(time.monotonic() - began, 1.0))

    async def _load(self, version: Version) -> LoramuxError | None:
        error = await self._read(version)
        if error is None and version.state is State.HOST:
            error = await self._residency.load(version, evict=False, wait=False)
        return error

    async def _read(self, version: Version) -> LoramuxError | None:
        if version.artefact is not None:
            return None
        if (error := await self._reader.read(version)) is not None:
            logger.warning("adapter %s is not served: %s", version.name, error)
        return error

    # -- from the state file

    def _look_up(
        self, given: Mapping[str, Given]
    ) -> tuple[dict[str, Saved], dict[str, Artefact], dict[str, Artefact | None]]:
        saved = {row.name: row for row in self._store.adapters()}
        digests = {d for row in saved.values() for d in (row.digest, row.previous_digest) if d}
        found = {digest: self._store.artefact(digest) for digest in digests}
        recalled = {name: one.artefact or self._store.recall(one.source) for name, one in given.items()}
        return saved, {digest: artefact for digest, artefact in found.items() if artefact}, recalled

    def _given(
        self, name: str, given: Given, artefact: Artefact | None, row: Saved | None, artefacts: Mapping[str, Artefact]
    ) -> Adapter:
        adapter = Adapter(name, self._changes.version(name, given.source, artefact), given=True)
        if row is not None:
            known = artefact.digest if artefact else None
            same = row.digest == known if known else row.source == str(given.source)
            # Another content under the name: what it meant last is what to roll back to.
            before = (row.previous_source, row.previous_digest) if same else (row.source, row.digest)
            adapter.previous = self._previous(name, *before, artefacts)
            adapter.pinned = adapter.current.pinned = row.pinned
        return adapter

    def _saved(self, row: Saved, artefacts: Mapping[str, Artefact]) -> Adapter:
        artefact = artefacts.get(row.digest or "")
        current = self._changes.version(row.name, Path(row.source or ""), artefact, expected=row.digest)
        adapter = Adapter(row.name, current, pinned=row.pinned, given=row.given)
        adapter.previous = self._previous(row.name, row.previous_source, row.previous_digest, artefacts)
        current.pinned = row.pinned
        return adapter

    def _previous(
        self, name: str, source: str | None, digest: str | None, artefacts: Mapping[str, Artefact]
    ) -> Version | None:
        artefact = artefacts.get(digest or "")
        return self._changes.version(name, Path(source or ""), artefact) if artefact else None
