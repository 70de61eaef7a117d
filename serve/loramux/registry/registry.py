"""The adapters of one server: what requests, routes and the start of the server ask for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from loramux.errors import AdapterExists, AdapterLoading, AdapterNotFound, AdapterRefused
from loramux.registry.catalogue import Catalogue
from loramux.registry.changes import Changes, Condition, always
from loramux.registry.compositions import COMPOSED, Compositions, Held, Share
from loramux.registry.draws import DRAWN, Draws
from loramux.registry.entry import Adapter, State, Version
from loramux.registry.protocols import Compose, DataPlane, Observer, Posteriors, Prepare
from loramux.registry.reader import Reader
from loramux.registry.residency import Residency
from loramux.registry.sources import Roots
from loramux.registry.startup import Given, Startup
from loramux.registry.store import Store
from loramux.registry.tasks import Tasks
from loramux_adapters.compose.prepared import Router


class AdapterRegistry:
    """Names, versions and leases. Single event loop; every public coroutine is safe to call concurrently."""

    def __init__(
        self,
        *,
        base: str,
        prepare: Prepare,
        compose: Compose,
        posteriors: Posteriors,
        data_plane: DataPlane,
        observer: Observer,
        store: Store,
        capacity_bytes: int,
        roots: tuple[Path, ...] = (),
        aliases: Collection[str] = (),
        patience_s: float = 30.0,
    ) -> None:
        self.base = base
        self.started = False  # the adapters of the start have settled
        self.capacity_bytes = capacity_bytes
        self._observer = observer
        self._patience_s = patience_s
        self._roots = Roots(roots)
        self._tasks = Tasks()
        self._catalogue = Catalogue([base, *aliases])
        self._reader = Reader(prepare, store, observer, self._tasks)
        self._residency = Residency(data_plane, self._reader, observer, self._tasks, capacity_bytes=capacity_bytes)
        self._changes = Changes(
            self._catalogue, self._reader, self._residency, store, observer, self._tasks, patience_s=patience_s
        )
        self._compositions = Compositions(compose, self._changes, self._residency)
        self._draws = Draws(posteriors, self._changes, self._residency, capacity_bytes=capacity_bytes)
        self._startup = Startup(self._catalogue, self._changes, self._reader, self._residency, store)

    # -- what there is

    def adapters(self) -> Mapping[str, Adapter]:
        """By name."""
        return self._catalogue

    def adapter(self, name: str) -> Adapter:
        """Raises AdapterNotFound, which names close ones."""
        if name not in self._catalogue:
            raise self._catalogue.not_found(name)
        return self._catalogue[name]

    def not_found(self, spelling: str) -> AdapterNotFound:
        """A 404 which names what the caller may have meant."""
        return self._catalogue.not_found(spelling)

    def resident_bytes(self) -> int:
        """Device bytes of all versions, draining ones included."""
        return self._residency.used_bytes

    def resident_count(self) -> int:
        """Versions on the device."""
        return self._residency.count

    def check_source(self, source: Path, param: str = "source") -> Path:
        """`source` as an absolute path, if a root allows it. Raises PathNotAllowed."""
        return self._roots.check(source, param)

    # -- what requests need

    def lookup(self, spelling: str) -> Version | None:
        """The version a model name means, if it is on the device: no need to wait for it."""
        try:
            version = self._catalogue.version(spelling)
        except AdapterNotFound:
            return None
        return version if version.state is State.RESIDENT else None

    async def resolve(self, spelling: str) -> Version:
        """The version a model name means, once it is on the device.

        Raises AdapterNotFound, AdapterLoading or PoolExhausted after the registry's patience, or the error its load
        ended with. Holds nothing: the request still has to `lease` it.
        """
        return await self._enter(lambda: self._catalogue.version(spelling), self._residency.recall)

    async def lease(self, tag: str, *, exact: bool) -> Version:
        """Hold a version on the device for one request, which gives it back by `release`.

        `tag` is `name@digest` as the name was looked up. What was replaced since gives way to what the name means
        now, unless the request asked for exactly this version. Raises as `resolve`.
        """
        name, _, digest = tag.partition("@")

        def target() -> Version:
            if name in (COMPOSED, DRAWN):
                made = self._compositions if name == COMPOSED else self._draws
                if (version := made.find(tag)) is None:
                    raise gone(tag)
                return version
            adapter = self._catalogue.get(name)
            if adapter is None:
                raise gone(name)
            if not exact:
                return adapter.current
            found = next((version for version in adapter.versions() if version.digest == digest), None)
            if found is None:
                raise gone(tag)
            return found

        return await self._enter(target, self._residency.take)

    def release(self, version: Version) -> None:
        """End a lease."""
        self._residency.release(version)

    @asynccontextmanager
    async def composed(self, parts: Sequence[Share], router: Router | None = None) -> AsyncIterator[Held]:
        """The weighted sum of adapters, or a router over them (without weights), on the device when this is entered.

        Its tag can be leased until this is left. Raises InvalidRequest for an adapter given twice, and as `resolve`,
        for parts, which need not be on the device, and for what is made of them; `param` names the part.
        """
        deadline = asyncio.get_running_loop().time() + self._patience_s
        found = [
            (await self._part(part.name, f"adapters[{place}].name", deadline), part.weight, part.task)
            for place, part in enumerate(parts)
        ]
        with self._compositions.held(found, router) as held:
            await self._enter(lambda: held.version, self._residency.recall, deadline)
            yield held

    async def samples(self, version: Version, asked: int | None) -> int:
        """How many draws of a resident version a request gets, which asks for so many or does not say.

        Raises InvalidRequest for more than there are, DrawsDoNotFit for more than can lie on the device with it.
        """
        return await self._draws.samples(version, asked)

    def draw_warnings(self, version: Version) -> tuple[str, ...]:
        """What bfloat16 would do to the draws of a version, once `samples` was asked of it."""
        return self._draws.warnings(version)

    @asynccontextmanager
    async def drawn(
        self, version: Version, *, seed: int, samples: int, counted: bool = True
    ) -> AsyncIterator[list[Version]]:
        """The first draws from the posterior of a leased version: on the device, and leased, until this is left.

        The same for the same version and seed, whoever asks and whenever. `counted`: the observer is told how many of
        them were there already. Raises as `resolve`.
        """
        deadline = asyncio.get_running_loop().time() + self._patience_s

        missed = []

        async def lease(draw: Version) -> None:
            if draw.state is not State.RESIDENT:
                missed.append(draw)
            await self._enter(lambda: draw, self._residency.take, deadline)

        async with self._draws.held(version, seed=seed, samples=samples, lease=lease) as versions:
            if counted:
                self._observer.drawn(version.name, samples - len(missed), len(missed))
            yield versions

    async def _part(self, spelling: str, param: str, deadline: float) -> Version:
        """The version that a part's name means, once its artefact is there."""
        try:
            return await self._enter(
                lambda: self._catalogue.version(spelling), lambda version: version.prepared, deadline
            )
        except AdapterRefused as error:  # all its requests share this one
            raise type(error)(
                f"The part {spelling!r} failed: {error.message}", code=error.code, hint=error.hint, param=param
            ) from None
        except (AdapterNotFound, AdapterLoading) as error:
            error.param = param
            raise

    async def _enter(
        self, target: Callable[[], Version], enter: Callable[[Version], bool], deadline: float | None = None
    ) -> Version:
        """What `target` says, as soon as `enter` lets it in; both are asked again after every wait."""
        if enter(version := target()):
            return version
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout_at(began + self._patience_s if deadline is None else deadline):
                while not enter(version := target()):
                    await self._approach(version)
        except TimeoutError:
            raise self._residency.lacks_room(version) or AdapterLoading(
                f"The adapter {version.name!r} is still loading ({version.state}).",
                hint="Try again shortly.",
                param="model",
            ) from None
        self._observer.waited(version.name, loop.time() - began)
        return version

    async def _approach(self, version: Version) -> None:
        """One step of `version` towards the device. Raises what its load ended with."""
        if version.state is State.FAILED:
            error = version.error
        elif not version.prepared:
            error = await asyncio.shield(self._reader.read(version))
        else:
            with self._residency.wanted(version):
                error = await self._residency.settle(version)
        if error is not None:
            # It outlives the request: with its traceback it would keep every request's frames.
            raise error.with_traceback(None)

    # -- changes

    async def put(
        self,
        name: str,
        source: Path,
        *,
        pinned: bool | None = None,
        condition: Condition = always,
        turn_s: float | None = None,
    ) -> asyncio.Task[Adapter]:
        """Begin to make `name` answer with what `source` holds; see `Changes.put`.

        The new version is resident before the name means it, and the old one leaves when its requests have ended. If
        both do not fit on the device, the name changes once the new one is verified, and it is loaded when the old
        one has left. Whatever fails, the old one serves on.
        """
        return await self._changes.put(name, source, pinned=pinned, condition=condition, turn_s=turn_s)

    async def load(self, name: str, source: Path, *, replace: bool = False) -> Adapter:
        """Put, and wait until requests may use it. Without `replace`, raises AdapterExists for a name that is taken."""

        def free(adapter: Adapter | None) -> None:
            if adapter is not None and not replace and adapter.current.error is None:
                raise AdapterExists(
                    f"The adapter {name!r} is already loaded.",
                    hint='Send "load_inplace": true to replace it, or unload it first.',
                    param="lora_name",
                )

        return await asyncio.shield(await self.put(name, source, condition=free))

    async def delete(self, name: str, *, condition: Condition = always) -> Adapter:
        """Withdraw `name` at once; running requests finish, then the memory is freed.

        Waits for the memory only if no request runs on it. Raises AdapterNotFound.
        """
        return await asyncio.shield(self._tasks.spawn(self._changes.delete(name, condition=condition)))

    async def rollback(self, name: str, *, condition: Condition = always) -> Adapter:
        """Let the previous version serve again. Raises AdapterNotFound, NoPreviousVersion."""
        return await asyncio.shield(self._tasks.spawn(self._changes.rollback(name, condition=condition)))

    async def pin(self, name: str, pinned: bool = True) -> Adapter:
        """Exempt the adapter from eviction, or no longer. Raises AdapterNotFound."""
        return await asyncio.shield(self._tasks.spawn(self._changes.pin(name, pinned)))

    # -- the start

    async def start(self, given: Mapping[str, Given]) -> None:
        """Know what the state file and the command line name, and load what must be there before the first request.

        The rest is read, and loaded while there is room, after `start` has returned.
        Raises what keeps a required adapter from being served.
        """
        await self._startup.restore(given)
        await self._startup.settle(given)
        self.started = True
        self._tasks.spawn(self._startup.resume())
        self._tasks.spawn(self._startup.warm_up())


def gone(name: str) -> AdapterNotFound:
    """The 404 of a request whose adapter was removed after it had been looked up."""
    return AdapterNotFound(
        f"The adapter {name!r} was unloaded.", hint="GET /v1/models lists what is served.", param="model"
    )
