"""Who lies in device memory: loads that are shared, leases that hold, evictions that make room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from loramux.errors import AdapterRefused, LoramuxError, PoolExhausted
from loramux.registry.entry import State, Version
from loramux.registry.failures import as_loramux_error
from loramux.registry.protocols import DataPlane, Observer
from loramux.registry.reader import Reader
from loramux.registry.tasks import Tasks

logger = logging.getLogger(__name__)

Load = asyncio.Task[LoramuxError | None]


class Residency:
    """The versions on the device, least recently used first.

    A version is loaded once for all who wait for it, one version at a time, and evicted only while nobody holds it,
    nobody waits for it and it is not pinned. A load that finds no room waits while somebody wants it and anybody
    might give some back.

    A draw may borrow memory of its mean. Who lends stays until all have given back: borrowers are evicted before their
    lender, and when it is to leave, each of them leaves as soon as nobody uses it. So the bytes of a version that has
    left are free.
    """

    def __init__(
        self,
        data_plane: DataPlane,
        reader: Reader,
        observer: Observer,
        tasks: Tasks,
        *,
        capacity_bytes: int,
    ) -> None:
        self._data_plane = data_plane
        self._reader = reader
        self._observer = observer
        self._tasks = tasks
        self._capacity_bytes = capacity_bytes
        self._held: dict[Version, None] = {}  # in order of their last use
        self._loads: dict[Version, Load] = {}
        self._tries: set[Version] = set()  # loads that give up where another would wait or evict
        self._unloads: dict[Version, asyncio.Task[None]] = {}
        self._short: dict[Version, PoolExhausted] = {}  # loads that wait for room
        self._running: Counter[str] = Counter()
        self._copying = asyncio.Lock()
        self._room = asyncio.Event()  # set and replaced whenever there may be more room than before

    @property
    def used_bytes(self) -> int:
        """Device bytes of all versions, those that are leaving included. Any thread may ask: metrics do."""
        return sum(version.resident_bytes for version in list(self._held))

    @property
    def count(self) -> int:
        """Versions on the device."""
        return len(self._held)

    # -- leases

    def take(self, version: Version) -> bool:
        """Lease `version` for one request, if it is on the device: it stays there until `release`."""
        if not self.recall(version):
            return False
        version.leases += 1
        self._running[version.name] += 1
        self._observer.leases(version.name, self._running[version.name])
        return True

    def release(self, version: Version) -> None:
        """End a lease. The last one lets a draining version go."""
        version.leases -= 1
        self._running[version.name] -= 1
        self._observer.leases(version.name, self._running[version.name])
        if not self._running[version.name]:
            del self._running[version.name]
        self._touch(version)
        if not version.leases:
            self._let_go(version)
            self.recheck()

    def recall(self, version: Version) -> bool:
        """Use `version`, if it is resident; one that was only draining is so again, unless it goes for good."""
        if version.state is State.DRAINING and not version.retired and version not in self._unloads:
            version.move(State.RESIDENT)
        if version.state is not State.RESIDENT:
            return False
        self._touch(version)
        return True

    @contextmanager
    def wanted(self, version: Version) -> Iterator[None]:
        """Keep `version` from being evicted between its load and what it is loaded for."""
        version.waiting += 1
        try:
            yield
        finally:
            version.waiting -= 1
            if not version.waiting:
                self._let_go(version)
                self.recheck()

    def _touch(self, version: Version) -> None:
        version.last_used = time.time()
        self._held[version] = self._held.pop(version)

    # -- the way in

    async def settle(self, version: Version) -> LoramuxError | None:
        """One step of a `wanted` version to the device. Look again afterwards: it may have been retired meanwhile.

        Ends with the error of its load, if that failed. Somebody else's mere try is waited for, and tells nothing.
        """
        if (unload := self._unloads.get(version)) is not None:
            await asyncio.shield(unload)
            return None
        told = version not in self._tries
        error = await asyncio.shield(self.load(version))
        return error if told else None

    def lacks_room(self, version: Version) -> PoolExhausted | None:
        """What keeps a load waiting, if it is memory."""
        return self._short.get(version)

    def load(self, version: Version, *, evict: bool = True, wait: bool = True, keep: Collection[Version] = ()) -> Load:
        """Copy a version on the host to the device. Who asks meanwhile shares the load. Ends with its error, if any.

        evict   may take the place of others, but of those in `keep`
        wait    may wait for others to end
        """
        if version not in self._loads:
            if not (evict and wait):
                self._tries.add(version)
            self._loads[version] = self._tasks.spawn(self._shared_load(version, evict, wait, keep))
        return self._loads[version]

    async def _shared_load(
        self, version: Version, evict: bool, wait: bool, keep: Collection[Version]
    ) -> LoramuxError | None:
        try:
            return await self._load(version, evict, wait, keep)
        finally:
            # Here, and not in a callback of the task, which runs later: who came in between would get a task that is
            # done, never leave the event loop to others while awaiting it, and so ask again for ever.
            del self._loads[version]
            self._tries.discard(version)

    async def _load(self, version: Version, evict: bool, wait: bool, keep: Collection[Version]) -> LoramuxError | None:
        full: PoolExhausted | None = None
        with version.at_work():
            while not version.retired:
                async with self._copying:
                    room = self._room
                    full = await self._attempt(version, evict, keep)
                if full is None:
                    return version.error
                # How long is up to those who wait for it.
                if not (wait and version.waiting and self._room_may_come(version, keep)):
                    break
                self._short[version] = full
                await room.wait()
        self._short.pop(version, None)
        if version.retired or full is None:
            return None
        if wait:  # a mere try is no failure
            version.error = full
            self._observer.load_failed(version.name, full.code)
        return full

    async def _attempt(self, version: Version, evict: bool, keep: Collection[Version]) -> PoolExhausted | None:
        """Make room as far as one may, and copy. None: it is resident, or has failed with `version.error`."""
        while True:
            full = self._shortage(version) or await self._copy(version)
            if full is None:
                return None
            if self._unloads:  # memory that is on its way back
                await asyncio.wait(list(self._unloads.values()))
                continue
            victims = self._victims(version, keep) if evict else []
            if not victims:
                return full
            for victim in victims:
                if self._evictable(victim):  # it may have been taken while another one left
                    self._observer.evicted(victim.name)
                    victim.move(State.DRAINING)
                    await self._leave(victim)

    def _shortage(self, version: Version) -> PoolExhausted | None:
        """That it does not fit, if that is known beforehand."""
        if version.needed_beside is not (self._lender(version) is not None):
            return None
        free = self._capacity_bytes - self.used_bytes
        return PoolExhausted.of(version.needed_bytes, free) if version.needed_bytes > free else None

    async def _copy(self, version: Version) -> PoolExhausted | None:
        assert version.artefact is not None
        version.error = None
        started = time.monotonic()
        lender = self._lender(version)
        if lender is not None:
            version.borrow(lender)
        try:
            size = await self._data_plane.load(
                version.version_id, version.artefact, None if lender is None else lender.version_id
            )
        except PoolExhausted as full:
            self._give_back(version)
            version.needed_bytes, version.needed_beside = full.needed_bytes, lender is not None
            return full
        except Exception as error:
            self._give_back(version)
            if isinstance(error, AdapterRefused) and error.code == "adapter_unreadable" and not version.mended:
                version.mended = True  # once: what is unreadable again will stay so
                if await self._reader.read(version) is None:
                    return await self._copy(version)
            elif version.state is State.HOST:
                self._failed(version, error)
            return None
        version.load_seconds["copy"] = time.monotonic() - started
        self._arrived(version, size)
        return None

    def _arrived(self, version: Version, size: int) -> None:
        version.resident_bytes = version.needed_bytes = size
        version.needed_beside = version.borrowed_from is not None
        version.mended = False
        self._held[version] = None
        version.move(State.RESIDENT)
        tier = "host" if version.loads or "read" not in version.load_seconds else "source"
        stages = dict(version.load_seconds) if tier == "source" else {"copy": version.load_seconds["copy"]}
        version.loads += 1
        self._observer.loaded(version.name, tier, stages, size)
        if version.retired:
            self.drain(version)
        self._let_go(version)

    def _failed(self, version: Version, error: Exception) -> None:
        version.error = as_loramux_error(error, version.source)
        self._observer.load_failed(version.name, version.error.code)
        if version.error.code == "internal_error":
            logger.exception("loading adapter %s failed", version.name)
        if isinstance(error, AdapterRefused):  # for good; anything else may go better the next time
            version.move(State.FAILED)

    # -- room

    def _victims(self, version: Version, keep: Collection[Version]) -> list[Version]:
        """Whom to evict for `version`, least recently used first; nobody if all of them would not do.

        At least one: a pool that is full by its own account may have its free bytes in pieces, or its slots taken.
        """
        shortfall = version.needed_bytes - (self._capacity_bytes - self.used_bytes)
        victims: dict[Version, None] = {}
        for held in self._held:
            leaving = [*held.borrowers, held]
            if not all(_idle(one) and one not in keep for one in leaving):
                continue
            for one in leaving:
                if one in victims:
                    continue
                victims[one] = None
                shortfall -= one.resident_bytes
                if shortfall <= 0:
                    return list(victims)
        return []

    def _evictable(self, version: Version) -> bool:
        return _idle(version) and not version.borrowers

    def _room_may_come(self, version: Version, keep: Collection[Version]) -> bool:
        """Whether somebody who holds memory now will give up enough of it, sooner or later."""
        stays = [held for held in self._held if held.pinned or held in keep]
        return len(stays) < len(self._held) and self._fits_beside(version, stays)

    def fits_instead(self, version: Version, old: Version) -> bool:
        """Whether `version` would fit if `old`, and all that is not pinned, were gone."""
        return self._fits_beside(version, [held for held in self._held if held.pinned and held is not old])

    def _fits_beside(self, version: Version, stays: Collection[Version]) -> bool:
        return version.needed_bytes <= self._capacity_bytes - sum(held.resident_bytes for held in stays)

    # -- the way out

    def drain(self, version: Version) -> None:
        """Let no new request in; off the device once the running ones end."""
        if version.state is State.RESIDENT:
            version.move(State.DRAINING)
        for borrower in list(version.borrowers):
            self._let_go(borrower)
        self._let_go(version)
        self.recheck()

    def _let_go(self, version: Version) -> None:
        """Off the device, if it is on its way there and nobody keeps it: no request, no borrower. Who borrows from a
        version that is to leave is on its way as well, once no request waits for it either."""
        lender = version.borrowed_from
        if _idle(version) and lender is not None and lender.state is State.DRAINING:
            version.move(State.DRAINING)
        if version.state is State.DRAINING and not version.leases and not version.borrowers:
            self._leave(version)

    def _lender(self, version: Version) -> Version | None:
        """Who could lend to it now."""
        lender = version.lender
        return lender if lender in self._held and lender not in self._unloads else None

    def _give_back(self, version: Version) -> None:
        if (lender := version.give_back()) is not None:
            self._let_go(lender)

    def recheck(self) -> None:
        """Loads that wait for room look again: there may be more, or they may be wanted no more."""
        self._room.set()
        self._room = asyncio.Event()

    async def left(self, version: Version) -> None:
        """Wait until a version that nobody uses is off the device, after those that borrow from it."""
        for borrower in list(version.borrowers):
            await self.left(borrower)
        if (unload := self._unloads.get(version)) is not None:
            await asyncio.shield(unload)

    def _leave(self, version: Version) -> asyncio.Task[None]:
        if version not in self._unloads:
            self._unloads[version] = self._tasks.spawn(self._unload(version))
        return self._unloads[version]

    async def _unload(self, version: Version) -> None:
        try:
            await self._data_plane.unload(version.version_id)
        except Exception:  # the engine is gone, and its memory with it
            logger.exception("unloading adapter %s failed", version.name)
        del self._unloads[version], self._held[version]
        version.resident_bytes = 0
        version.move(State.GONE if version.retired else State.HOST)
        if not any(held.name == version.name for held in self._held):
            self._observer.unloaded(version.name)
        self._give_back(version)
        self.recheck()


def _idle(version: Version) -> bool:
    """Whether nobody uses a resident version, or is about to."""
    return version.state is State.RESIDENT and not (version.leases or version.waiting or version.pinned)
