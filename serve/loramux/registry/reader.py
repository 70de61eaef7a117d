"""From a source to its artefact: read, checked and lowered in worker threads, a few at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from loramux.errors import AdapterRefused, LoramuxError, StateNotWritten
from loramux.registry.entry import State, Version
from loramux.registry.failures import as_loramux_error
from loramux.registry.protocols import Observer, Prepare
from loramux.registry.sources import signature
from loramux.registry.store import Store
from loramux.registry.tasks import Tasks
from loramux_adapters import Artefact

logger = logging.getLogger(__name__)

#: More would compete with the event loop for the interpreter and with the engine for cores.
AT_ONCE = 2


class Reader:
    """Brings versions to the host."""

    def __init__(self, prepare: Prepare, store: Store, observer: Observer, tasks: Tasks) -> None:
        self._prepare = prepare
        self._store = store
        self._observer = observer
        self._tasks = tasks
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._reads: dict[Version, asyncio.Task[LoramuxError | None]] = {}

    def read(self, version: Version) -> asyncio.Task[LoramuxError | None]:
        """Bring `version` from its source to the host, or to FAILED with the error that the task ends with.

        Who asks meanwhile shares the read. A version that was read before must turn out to be the same.
        """
        if version not in self._reads:
            self._reads[version] = self._tasks.spawn(self._shared_read(version))
        return self._reads[version]

    async def _shared_read(self, version: Version) -> LoramuxError | None:
        try:
            return await self._read(version)
        finally:
            del self._reads[version]  # not in a callback: see `Residency._shared_load`

    async def _read(self, version: Version) -> LoramuxError | None:
        # Errors are returned and not raised: with a traceback they would keep the reader's tensors alive.
        with version.at_work():
            async with self._turns:
                if version.retired:
                    return None
                await self._attempt(version)
            if version.error is not None:
                version.move(State.FAILED)
                self._observer.load_failed(version.name, version.error.code)
            return version.error

    async def _attempt(self, version: Version) -> None:
        expected = version.artefact.digest if version.artefact else version.expected
        started = time.monotonic()
        version.error = None
        version.move(State.READING)

        def on_read() -> None:
            version.load_seconds["read"] = time.monotonic() - started
            version.move(State.VERIFYING)

        try:
            artefact = await asyncio.to_thread(self._work, version, asyncio.get_running_loop(), on_read)
            if expected not in (None, artefact.digest):
                raise AdapterRefused(
                    f"The prepared adapter {version.tag!r} is lost, and its source holds another one now.",
                    code="adapter_source_changed",
                    hint="Put the adapter again to serve what its source holds.",
                )
        except Exception as error:  # a version that stayed on its way would block its name for ever
            version.error = as_loramux_error(error, version.source)
            if version.error.code == "internal_error":
                logger.exception("reading adapter %s failed", version.name)
            return
        version.load_seconds["verify"] = time.monotonic() - started - version.load_seconds["read"]
        version.loads = 0
        version.artefact = artefact
        version.move(State.HOST)

    def _work(self, version: Version, loop: asyncio.AbstractEventLoop, on_read: Callable[[], None]) -> Artefact:
        def told() -> None:
            loop.call_soon_threadsafe(on_read)

        if version.make is not None:
            told()
            return version.make()
        return read_source(self._prepare, self._store, version.source, told)


def read_source(prepare: Prepare, store: Store, source: Path, on_read: Callable[[], object] = lambda: None) -> Artefact:
    """Read, check and lower a source now, and remember what it contains. Raises what `prepare` raises."""
    seen = signature(source)  # before reading: what changes meanwhile will differ from it
    artefact = prepare(source, on_read=on_read)
    try:
        store.remember(source, seen, artefact)
    except StateNotWritten:  # it will be read again at the next start, that is all
        logger.exception("could not remember what %s contains", source)
    return artefact
