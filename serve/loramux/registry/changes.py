"""Changes of what a name means: put, delete, roll back, pin. One at a time per name, on disk before they are told."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loramux.errors import (
    AdapterBusy,
    AdapterNameTaken,
    LoramuxError,
    NoPreviousVersion,
    PoolExhausted,
    StateNotWritten,
)
from loramux.registry.catalogue import Catalogue
from loramux.registry.entry import Adapter, State, Version
from loramux.registry.protocols import Observer
from loramux.registry.reader import Reader
from loramux.registry.residency import Residency
from loramux.registry.store import Saved, Store
from loramux.registry.tasks import Tasks, Turns
from loramux_adapters import Artefact

logger = logging.getLogger(__name__)

#: Called with the adapter (None: there is no such name) when it is the caller's turn; raises to refuse the change.
Condition = Callable[[Adapter | None], None]


def always(_: Adapter | None) -> None:
    """The condition of a change that has none."""


class Changes:
    """Everything that alters the catalogue. A change that has begun goes on if its caller leaves."""

    def __init__(
        self,
        catalogue: Catalogue,
        reader: Reader,
        residency: Residency,
        store: Store,
        observer: Observer,
        tasks: Tasks,
        *,
        patience_s: float,
    ) -> None:
        self._catalogue = catalogue
        self._reader = reader
        self._residency = residency
        self._store = store
        self._observer = observer
        self._tasks = tasks
        self._patience_s = patience_s
        self.turns = Turns()
        self._ids: Iterator[int] = itertools.count(1)  # vLLM reads 0 as "no adapter"

    def version(
        self, name: str, source: Path, artefact: Artefact | None = None, expected: str | None = None
    ) -> Version:
        """A new version with an id of its own."""
        return Version(name, source, next(self._ids), self._observer, artefact=artefact, expected=expected)

    # -- put

    async def put(
        self, name: str, source: Path, *, pinned: bool | None, condition: Condition, turn_s: float | None
    ) -> asyncio.Task[Adapter]:
        """Begin to make `name` answer with what `source` holds; the task ends when requests may use it.

        Returns once the change is accepted and will survive a crash. Raises AdapterNameTaken, what `condition`
        raises, or AdapterBusy if another change of the name does not end within `turn_s`; then nothing has happened.
        """
        if self._catalogue.is_reserved(name):
            raise AdapterNameTaken(f"The name {name!r} is the base model's.", hint="Choose another name.")
        try:
            async with asyncio.timeout(turn_s):
                await self.turns.take(name)
        except TimeoutError:
            raise AdapterBusy(
                f"Another change of {name!r} is under way.", hint="Try again when it has ended, or wait longer."
            ) from None
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self._tasks.spawn(self._put(name, source, pinned, condition, accepted))
        either: list[asyncio.Future[Any]] = [task, accepted]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not accepted.done():
            await task  # raises
        return task

    async def _put(
        self, name: str, source: Path, pinned: bool | None, condition: Condition, accepted: asyncio.Future[None]
    ) -> Adapter:
        try:
            condition(self._catalogue.get(name))
            adapter, new = await self._accept(name, source, pinned)
            accepted.set_result(None)
            error = await self._reader.read(new)
            if error is None:
                new, error = await self._replace(adapter, new)
            elif new is adapter.pending:
                await self._give_up(adapter, error)
        finally:
            self.turns.give(name)
        # With the name's turn given back: this may take as long as somebody else's requests run.
        if (error := error or await self.bring(new)) is not None:
            raise error.with_traceback(None)
        return adapter

    async def _accept(self, name: str, source: Path, pinned: bool | None) -> tuple[Adapter, Version]:
        """Write the intention down: after a crash it is carried out."""
        adapter, new = self._catalogue.get(name), self.version(name, source)
        try:
            if adapter is None:
                adapter = Adapter(name, new, pinned=bool(pinned))
                await self._save(adapter)
                self._catalogue[name] = adapter
            elif adapter.current.state is State.FAILED:  # nothing is lost: requests may wait for the new one at once
                await self._save(replace(adapter, current=new, given=False))
                self._forget(adapter.current)
                new.pinned = adapter.pinned
                adapter.current, adapter.given = new, False
            else:
                await self._save(adapter, pending=source)
                adapter.pending = new
        except LoramuxError:
            new.retire()
            raise
        adapter.error = None
        if pinned is not None:
            self._pin(adapter, pinned)
        return adapter, new

    async def _give_up(self, adapter: Adapter, error: LoramuxError) -> None:
        """The current version serves on."""
        if (pending := adapter.pending) is not None:
            self._forget(pending)
        adapter.pending, adapter.error = None, error
        try:
            await self._save(adapter)
        except StateNotWritten:  # then the next start tries once more
            logger.exception("the failed change of %s is not forgotten", adapter.name)

    async def _replace(self, adapter: Adapter, new: Version) -> tuple[Version, LoramuxError | None]:
        """`new` is on the host: let the name mean it. Returns the version that the name means then."""
        same = next((v for v in adapter.versions() if _equal(v, new)), None)
        if new is adapter.pending and same is not None:
            # There already: its id, and with it its blocks in the KV cache, stay valid.
            same.source = new.source
            self._forget(new)
            new = same
        try:
            await self._serve(adapter, new)
        except LoramuxError as error:
            await self._give_up(adapter, error)
            return adapter.current, error
        return new, None

    async def _serve(self, adapter: Adapter, new: Version) -> None:
        with self._residency.wanted(new):  # or another load would evict it before anybody could ask for it
            if new is not adapter.current:
                await self._make_ready(new, adapter.current)
            await self._switch(adapter, new)

    async def _make_ready(self, new: Version, old: Version) -> None:
        """Bring `new` to the device beside `old`, which serves on; where both do not fit, after it (`bring`).

        Raises LoramuxError if `new` would not fit in its place either.
        """
        while not self._residency.recall(new):
            if new.error is not None and new.state is State.FAILED:
                raise new.error.with_traceback(None)
            await self._residency.left(new)
            error = await self._residency.load(new, wait=False, keep=(old,))
            if isinstance(error, PoolExhausted) and self._residency.fits_instead(new, old):
                return
            if error is not None:
                raise error.with_traceback(None)

    async def _switch(self, adapter: Adapter, new: Version) -> None:
        """Let the name mean `new`: first on disk, then here, between two turns of the event loop."""
        old, kept = adapter.current, adapter.previous
        if new is not old:
            kept = old if old.artefact is not None and old.state is not State.FAILED else None
        elif kept is not None and _equal(kept, new):
            kept = None
        await self._save(replace(adapter, current=new, previous=kept, given=False))
        dropped = [v for v in adapter.versions() if v not in (new, kept)]
        adapter.current, adapter.previous, adapter.pending, adapter.given = new, kept, None, False
        if new is not old:
            old.pinned, new.pinned = False, adapter.pinned
            self._residency.drain(old)
        for version in dropped:
            self._forget(version)

    async def bring(self, version: Version) -> LoramuxError | None:
        """A version on the host to the device, however long that takes, but waiting for room only as requests do.

        Its error, if it fails.
        """
        while not version.retired and not self._residency.recall(version):
            with self._residency.wanted(version):
                try:
                    async with asyncio.timeout(self._patience_s):
                        error = await self._residency.settle(version)
                except TimeoutError:
                    error = self._residency.lacks_room(version)
            if error is not None:
                return error
        return None

    # -- the others

    async def delete(self, name: str, *, condition: Condition) -> Adapter:
        """Forget `name`; its running requests finish, then its memory is freed."""
        async with self._turn(name, condition) as adapter:
            await asyncio.to_thread(self._store.delete, name)
            del self._catalogue[name]
            for version in adapter.versions():
                self._forget(version)
        for version in adapter.versions():
            await self._residency.left(version)
        return adapter

    async def rollback(self, name: str, *, condition: Condition) -> Adapter:
        """Let current and previous version change places. Raises NoPreviousVersion."""
        async with self._turn(name, condition) as adapter:
            if (previous := adapter.previous) is None:
                raise NoPreviousVersion(
                    f"The adapter {name!r} has no previous version.", hint="Put the content that you want to serve."
                )
            await self._serve(adapter, previous)
            adapter.error = None
        if (error := await self.bring(previous)) is not None:
            raise error.with_traceback(None)
        return adapter

    async def pin(self, name: str, pinned: bool) -> Adapter:
        """Keep the current version of `name` on the device whatever else is asked for, or stop doing so."""
        async with self._turn(name, always) as adapter:
            await self._save(replace(adapter, pinned=pinned))
            self._pin(adapter, pinned)
        return adapter

    def _pin(self, adapter: Adapter, pinned: bool) -> None:
        adapter.pinned = adapter.current.pinned = pinned
        if not pinned:
            self._residency.recheck()
        elif adapter.current.artefact is not None:
            self._tasks.spawn(self.bring(adapter.current))

    @asynccontextmanager
    async def _turn(self, name: str, condition: Condition) -> AsyncIterator[Adapter]:
        """The turn to change an adapter that exists. Raises AdapterNotFound."""
        if name not in self._catalogue:
            raise self._catalogue.not_found(name)
        await self.turns.take(name)
        try:
            adapter = self._catalogue.get(name)
            if adapter is None:
                raise self._catalogue.not_found(name)
            condition(adapter)
            yield adapter
        finally:
            self.turns.give(name)

    def _forget(self, version: Version) -> None:
        version.retire()
        self._residency.drain(version)

    async def _save(self, adapter: Adapter, pending: Path | None = None) -> None:
        """What a restart will find. Raises StateNotWritten."""
        current, previous = adapter.current, adapter.previous
        saved = Saved(
            adapter.name,
            source=str(current.source),
            digest=_digest(current),
            previous_source=str(previous.source) if previous else None,
            previous_digest=_digest(previous) if previous else None,
            pending_source=str(pending) if pending else None,
            pinned=adapter.pinned,
            given=adapter.given,
        )
        await asyncio.to_thread(self._store.save, saved)


def _digest(version: Version) -> str | None:
    return version.artefact.digest if version.artefact else version.expected


def _equal(one: Version, other: Version) -> bool:
    """Whether `one` is there to be used, and its content is the other's."""
    if one.artefact is None or other.artefact is None or one.state is State.FAILED:
        return False
    return one.artefact.digest == other.artefact.digest
