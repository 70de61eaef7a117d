"""Random requests and changes at random instants, over a device that is too small."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramux.errors import LoramuxError
from loramux.registry import State, Store

from ..fakes import World, make_artefact, until

NAMES = ("a", "b", "c", "d")
CONTENTS = tuple(f"{i}" for i in range(6))
CAPACITY = 2600


class Storm:
    """Clients that know nothing of each other; what must hold is checked at every step they take."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.world = World(capacity=CAPACITY, patience_s=0.2)
        self.world.data_plane.shared = 0.75  # of a draw
        self.world.prepare.sizes = {content: 400 + 300 * i for i, content in enumerate(CONTENTS)}
        self.ids: dict[int, str] = {}  # version id -> the content it stands for
        self.answers = self.uncertainties = 0

    def check(self) -> None:
        world = self.world
        held = world.registry._residency._held
        assert sum(world.data_plane.resident.values()) <= CAPACITY
        for version in held:
            assert version.artefact is not None
            assert self.ids.setdefault(version.version_id, version.artefact.digest) == version.artefact.digest
            if version.leases:
                assert version.version_id in world.data_plane.resident
            if version.borrowed_from is not None:
                assert version.borrowed_from in held and version in version.borrowed_from.borrowers
        for adapter in world.registry.adapters().values():
            for version in adapter.versions():
                assert not version.retired
                assert (version.state in (State.RESIDENT, State.DRAINING)) == (version in held)

    async def pause(self) -> None:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)
        self.check()

    async def request(self) -> None:
        """One answer, wholly of one version; from the name or from one of its digests."""
        name = self.random.choice(NAMES)
        adapter = self.world.registry.adapters().get(name)
        exact = adapter is not None and self.random.random() < 0.3
        if adapter is not None and exact:
            version = self.random.choice(list(adapter.versions()))
            spelling = version.tag
        else:
            spelling = name
        resolved = await self.world.registry.resolve(spelling)
        await self.pause()
        leased = await self.world.registry.lease(resolved.tag, exact=exact)
        try:
            assert leased.name == name
            assert not exact or leased.digest == resolved.digest
            content = leased.digest
            for _ in range(self.random.randrange(6)):
                assert leased.state in (State.RESIDENT, State.DRAINING)
                assert leased.version_id in self.world.data_plane.resident
                assert leased.digest == content
                await self.pause()
            self.answers += 1
        finally:
            self.world.registry.release(leased)

    async def uncertain(self) -> None:
        """An answer that draws read, of whatever version it was."""
        registry = self.world.registry
        mean = await self.world.hold(self.random.choice(NAMES))
        try:
            await self.pause()
            samples, seed = self.random.randrange(1, 3), self.random.randrange(2)
            async with registry.drawn(mean, seed=seed, samples=samples) as versions:
                for version in versions:
                    leased = await registry.lease(version.tag, exact=True)
                    assert leased.tag == version.tag
                    await self.pause()
                    assert {leased.version_id, mean.version_id} <= self.world.data_plane.resident.keys()
                    registry.release(leased)
            self.uncertainties += 1
        finally:
            registry.release(mean)

    async def change(self) -> None:
        name, registry = self.random.choice(NAMES), self.world.registry
        kind = self.random.random()
        if kind < 0.6:
            content = self.random.choice(CONTENTS)
            task = await registry.put(name, Path("/adapters") / content)
            await task
        elif kind < 0.75:
            await registry.rollback(name)
        elif kind < 0.9:
            await registry.delete(name)
        else:
            await registry.pin(name, self.random.random() < 0.3)

    async def client(self, act: Callable[[], object], times: int) -> None:
        for _ in range(times):
            task = asyncio.ensure_future(act())  # type: ignore[arg-type]
            if self.random.random() < 0.1:
                await self.pause()
                task.cancel()  # the client leaves
            with contextlib.suppress(LoramuxError, asyncio.CancelledError):
                await task
            await self.pause()


@pytest.mark.parametrize("seed", range(40))
async def test_a_storm_of_requests_and_changes(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    storm = Storm(seed)
    world = storm.world
    for name in NAMES:
        await world.load(name, "0")
    clients = [storm.client(storm.request, 25) for _ in range(6)] + [storm.client(storm.change, 12) for _ in range(3)]
    clients += [storm.client(storm.uncertain, 10) for _ in range(3)]
    await asyncio.gather(*clients)
    assert storm.answers > 30 and storm.uncertainties
    await until(lambda: not world.registry._tasks._running)
    storm.check()
    assert not caplog.records, "an unexpected error, or one nobody was told of"
    # Nothing is held by anybody, and everything is accounted for.
    versions = [v for adapter in world.registry.adapters().values() for v in adapter.versions()]
    versions += world.registry._draws._made._versions.values()
    assert all(v.leases == v.waiting == v.busy == 0 for v in versions)
    assert {v.version_id for v in versions if v.state is State.RESIDENT} == set(world.data_plane.resident)
    assert world.registry.resident_bytes() == sum(world.data_plane.resident.values())
    assert not any(world.observer.leased.values())
    assert +world.observer.states == +type(world.observer.states)((v.name, v.state) for v in versions)
    # The state file says the same, and whatever a restart finds there can be served.
    saved = {row.name: row for row in world.store.adapters()}
    assert set(saved) == set(world.registry.adapters())
    for name, adapter in world.registry.adapters().items():
        if adapter.current.artefact is not None:
            assert saved[name].digest == adapter.current.artefact.digest
        assert saved[name].pinned == adapter.pinned and saved[name].pending_source is None
        previous = adapter.previous.artefact.digest if adapter.previous and adapter.previous.artefact else None
        assert saved[name].previous_digest == previous


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["put", "rollback", "delete", "pin"]), st.integers(0, 3)), max_size=10))
def test_after_any_sequence_of_changes_a_restart_finds_the_same(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int]]
) -> None:
    """A model of one name, next to the real thing and to what it leaves on disk."""
    cache = tmp_path_factory.mktemp("cache")
    model: tuple[str, str | None, bool] | None = None

    async def run() -> dict[str, tuple[str | None, str | None, bool]]:
        nonlocal model
        store = Store.in_memory(cache)
        world = World(store=store)
        world.prepare.cache = cache
        for kind, argument in changes:
            content = str(argument)
            try:
                if kind == "put":
                    await world.load("a", content, replace=True)
                    pinned = model[2] if model else False
                    same = model is not None and model[0] == content
                    model = (content, (model[1] if same else model[0]) if model else None, pinned)
                elif kind == "rollback":
                    await world.registry.rollback("a")
                    assert model and model[1]
                    model = (model[1], model[0], model[2])
                elif kind == "delete":
                    await world.registry.delete("a")
                    model = None
                else:
                    await world.registry.pin("a", argument > 1)
                    assert model
                    model = (*model[:2], argument > 1)
            except LoramuxError:
                assert model is None or (kind == "rollback" and model[1] is None)
        again = World(store=store)
        await again.registry.start({})
        assert again.prepare.read == []
        return {
            name: (a.current.digest, a.previous.digest if a.previous else None, a.pinned)
            for name, a in again.registry.adapters().items()
        }

    found = asyncio.run(run())
    digest = {content: make_artefact(content).short for content in "0123"}
    wanted = {"a": (digest[model[0]], digest[model[1]] if model[1] else None, model[2])} if model else {}
    assert found == wanted
