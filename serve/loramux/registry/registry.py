"""Names to versions: loading, replacing and unloading adapters while requests run."""

from __future__ import annotations

import asyncio
import difflib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from loramux.errors import (
    AdapterExists,
    AdapterLoading,
    AdapterNotFound,
    AdapterRefused,
    AdapterSourceMissing,
    LoramuxError,
    PathNotAllowed,
)
from loramux.registry.entry import AdapterEntry, State
from loramux_adapters import AdapterError, Artefact
from loramux_adapters import AdapterNotFound as AdapterFolderNotFound

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Reads, checks and lowers a source; runs in a worker thread, raises AdapterError.
Prepare = Callable[[Path], Artefact]


class DataPlane(Protocol):
    """The device side of an adapter version."""

    async def load(self, version_id: int, artefact: Artefact) -> int:
        """Copy a lowered artefact into the pool, between engine steps; returns its bytes there."""

    async def unload(self, version_id: int) -> None:
        """Free what `load` took. Only for versions no request uses."""


class Directory(Protocol):
    """Where the HTTP server looks a model name up."""

    def publish(self, entry: AdapterEntry) -> None: ...

    def withdraw(self, name: str) -> None: ...


class Observer(Protocol):
    """Told what happened to adapters, for metrics."""

    def loaded(self, name: str, stages: dict[str, float], resident_bytes: int) -> None: ...

    def load_failed(self, name: str, code: str) -> None: ...

    def unloaded(self, name: str) -> None: ...


class AdapterRegistry:
    """The adapters of one server. Single event loop; every public coroutine is safe to call concurrently."""

    def __init__(
        self,
        *,
        base: str,
        prepare: Prepare,
        data_plane: DataPlane,
        directory: Directory,
        observer: Observer,
        roots: tuple[Path, ...] = (),
        patience_s: float = 30.0,
    ) -> None:
        self.base = base
        self._prepare = prepare
        self._data_plane = data_plane
        self._directory = directory
        self._observer = observer
        self._roots = tuple(root.resolve() for root in roots)
        self._patience_s = patience_s
        self._entries: dict[str, AdapterEntry] = {}
        self._held: set[AdapterEntry] = set()  # versions with device memory, draining ones too
        self._tasks: set[asyncio.Task[Any]] = set()  # the event loop itself keeps only weak references
        self._ids = itertools.count(1)  # vLLM reads 0 as "no adapter"
        self._locks: dict[str, asyncio.Lock] = {}

    def entries(self) -> Mapping[str, AdapterEntry]:
        """Current entry of every name."""
        return dict(self._entries)

    def resident(self, name: str) -> AdapterEntry | None:
        """The version which requests for `name` may use now."""
        entry = self._entries.get(name)
        return entry if entry is not None and entry.state is State.RESIDENT else None

    def resident_bytes(self) -> int:
        """Device bytes of all versions, draining ones included."""
        return sum(entry.resident_bytes for entry in self._held)

    def check_source(self, source: Path) -> Path:
        """`source` as an absolute path, if a root allows it. Raises PathNotAllowed."""
        try:
            resolved = source.expanduser().resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, an unknown ~user, a NUL
            resolved = None
        if resolved is None or not any(resolved.is_relative_to(root) for root in self._roots):
            raise PathNotAllowed(
                "This path is not under any adapter root.",
                hint="Start the server with --adapter-root DIR (repeatable) for folders requests may load from.",
                param="lora_path",
            )
        return resolved

    async def load(self, name: str, source: Path, *, replace: bool = False) -> AdapterEntry:
        """Make `name` answer with the adapter in `source`; returns once requests may use it.

        With `replace`, the new version becomes resident first, then the name switches, then the old one drains:
        a request sees one or the other. On any failure the previous version keeps serving. A caller that goes away
        does not stop the load. Raises AdapterExists, AdapterRefused, PoolExhausted.
        """
        return await asyncio.shield(self._spawn(self._load(name, source, replace)))

    async def _load(self, name: str, source: Path, replace: bool) -> AdapterEntry:
        async with self._locks.setdefault(name, asyncio.Lock()):
            current = self._entries.get(name)
            if name == self.base:
                raise AdapterExists(f"The name {name!r} is the base model's.", hint="Choose another name.")
            if current is not None and current.state is not State.FAILED and not replace:
                raise AdapterExists(
                    f"The adapter {name!r} is already loaded.",
                    hint='Send "load_inplace": true to replace it, or unload it first.',
                    param="lora_name",
                )
            entry = AdapterEntry(name=name, source=source, version_id=next(self._ids))
            serving = current is not None and current.state is State.RESIDENT
            if not serving:
                self._entries[name] = entry
            await self._bring_up(entry)
            self._entries[name] = entry
            self._directory.publish(entry)
            if serving and current is not None:
                self._drain(current)
            return entry

    async def unload(self, name: str) -> AdapterEntry:
        """Withdraw `name` at once; running requests finish, then the memory is freed.

        Waits for the memory only if no request runs on it. Raises AdapterNotFound.
        """
        if name not in self._entries:
            raise self.not_found(name)
        async with self._locks.setdefault(name, asyncio.Lock()):
            entry = self._entries.pop(name, None)
            if entry is None:
                raise self.not_found(name)
            self._directory.withdraw(name)
            if entry.state is State.RESIDENT:
                drained = self._drain(entry)
                if entry.in_flight == 0:
                    await asyncio.shield(drained)
            return entry

    async def resolve(self, name: str) -> AdapterEntry:
        """The resident entry of `name`, waiting while it loads.

        Raises AdapterNotFound, AdapterLoading after `patience_s`, or the error its load ended with.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise self.not_found(name)
        try:
            await asyncio.wait_for(entry.settled.wait(), self._patience_s)
        except TimeoutError:
            raise AdapterLoading(
                f"The adapter {name!r} is still loading ({entry.state}).", hint="Try again shortly.", param="model"
            ) from None
        if entry.error is not None:
            # The error outlives the request: with its traceback it would keep every request's frames.
            raise entry.error.with_traceback(None)
        if entry.state is not State.RESIDENT:  # replaced or unloaded since
            return await self.resolve(name)
        return entry

    def not_found(self, name: str) -> AdapterNotFound:
        """A 404 which names what the caller may have meant."""
        name = name[:128]
        # Bounded: with thousands of adapters the comparison would hold up the event loop.
        resident = (n for n, e in self._entries.items() if e.state is State.RESIDENT)
        served = [self.base, *itertools.islice(resident, 1000)]
        close = difflib.get_close_matches(name, served, n=3) or served[:3]
        return AdapterNotFound(
            f"The model {name!r} does not exist.",
            hint=f"Did you mean {', '.join(map(repr, close))}? GET /v1/models lists all.",
            param="model",
        )

    async def _bring_up(self, entry: AdapterEntry) -> None:
        entry.move(State.VERIFYING)
        try:
            started = time.monotonic()
            entry.artefact = await asyncio.to_thread(self._prepare, entry.source)
            entry.load_seconds["prepare"] = time.monotonic() - started
            entry.move(State.HOST)
            started = time.monotonic()
            entry.resident_bytes = await self._data_plane.load(entry.version_id, entry.artefact)
            entry.load_seconds["copy"] = time.monotonic() - started
        except Exception as error:  # an entry that stayed on its way would block its name for ever
            entry.error = as_loramux_error(error, entry.source)
            if entry.error.code == "internal_error":
                logger.exception("loading adapter %s failed", entry.name)
        if entry.error is None:
            entry.move(State.RESIDENT)
            self._held.add(entry)
            self._observer.loaded(entry.name, entry.load_seconds, entry.resident_bytes)
            return
        entry.move(State.FAILED)
        self._observer.load_failed(entry.name, entry.error.code)
        # Raised here and not above: a cause would keep the reader's frames, and with them its tensors.
        raise entry.error

    def _drain(self, entry: AdapterEntry) -> asyncio.Task[None]:
        entry.move(State.DRAINING)

        async def drain() -> None:
            await entry.idle.wait()
            await self._data_plane.unload(entry.version_id)
            entry.move(State.GONE)
            self._held.discard(entry)
            entry.resident_bytes = 0
            if self.resident(entry.name) is None:
                self._observer.unloaded(entry.name)

        return self._spawn(drain())

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def as_loramux_error(error: Exception, source: Path) -> LoramuxError:
    """What HTTP clients are told about a failed load: no path of the host."""
    if isinstance(error, LoramuxError):
        return error
    if isinstance(error, AdapterError):
        message = error.message
        for path in (source, source.resolve()):
            # Messages cut long names short: so much of one is always there.
            message = message.replace(f"{path.parent}/"[:150], "")
        refused = AdapterSourceMissing if isinstance(error, AdapterFolderNotFound) else AdapterRefused
        return refused(message, code=error.code, hint=error.hint, param=error.field)
    if isinstance(error, OSError):
        return AdapterRefused(
            f"The adapter could not be read: {error.strerror}.",
            code="adapter_unreadable",
            hint="Check the folder's permissions.",
        )
    return LoramuxError("The adapter could not be loaded.", hint="The server's log has the details.")
