"""After a crash or an orderly end, the server has the adapters it had, and those the command line names."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from loramux.errors import AdapterRefused, PoolExhausted
from loramux.registry import Given, State, Store
from loramux_adapters import AdapterCorrupt

from ..fakes import FakePrepare, World, until


class Machine:
    """A disk, and the servers that live on it one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.cache.mkdir()
        self.contents: dict[Path, str] = {}
        self.store: Store | None = None

    def source(self, name: str, content: str = "") -> Path:
        """An adapter folder whose files have been there for long."""
        path = self.folder / "sources" / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "weights").write_text(content or name)
        os.utime(path / "weights", (10**9, 10**9 + len(self.contents)))
        self.contents[path] = content or name
        return path

    async def start(self, given: dict[str, Given] | None = None, *, wait: bool = True, capacity: int = 10**6) -> World:
        """A server on this disk. The one before it may have ended in any way."""
        if self.store is not None:
            self.store.close()
        self.store = Store.open(self.folder / "state.sqlite", base="base", cache=self.cache)
        prepare = FakePrepare(self.cache)
        prepare.contents = self.contents
        world = World(store=self.store, prepare=prepare, capacity=capacity)
        await world.registry.start(given or {})
        assert world.registry.started
        if wait:
            await until(lambda: not world.registry._tasks._running)
        return world


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def shown(world: World) -> dict[str, tuple[str | None, str | None, bool]]:
    return {
        name: (a.current.digest, a.previous.digest if a.previous else None, a.pinned)
        for name, a in world.registry.adapters().items()
    }


async def test_what_was_put_comes_back_without_its_sources(machine: Machine) -> None:
    world = await machine.start()
    for name, content in (("a", "one"), ("a", "two"), ("b", "one"), ("c", "three")):
        await world.registry.load(name, machine.source(f"{name}-{content}", content), replace=True)
    await world.registry.pin("b")
    await world.registry.delete("c")
    before = shown(world)
    shutil.rmtree(machine.folder / "sources")
    world = await machine.start()
    assert shown(world) == before and set(before) == {"a", "b"}
    assert world.prepare.read == []
    assert world.current("b").pinned
    assert (await world.registry.rollback("a")).current.digest == before["a"][1]


async def test_the_command_line_wins_and_what_it_replaces_can_be_rolled_back_to(machine: Machine) -> None:
    given = {"a": Given(machine.source("flag"))}
    world = await machine.start(given)
    flag = world.current("a").digest
    assert machine.store is not None and machine.store.adapters() == []
    await world.registry.load("a", machine.source("put"), replace=True)
    put = world.current("a").digest
    world = await machine.start(given)
    assert shown(world)["a"][:2] == (flag, put)
    world = await machine.start()  # without the flag: what was put
    assert shown(world)["a"][:2] == (put, flag)


async def test_what_the_command_line_names_no_longer_is_forgotten(machine: Machine) -> None:
    given = {"a": Given(machine.source("a"))}
    world = await machine.start(given)
    await world.registry.pin("a")
    world = await machine.start(given)
    assert world.current("a").pinned and world.registry.adapter("a").previous is None
    assert shown(await machine.start()) == {}
    assert not (await machine.start(given)).current("a").pinned


async def test_an_unchanged_source_is_not_read_again(machine: Machine) -> None:
    given = {name: Given(machine.source(name)) for name in ("a", "b", "c")}
    await machine.start(given)
    machine.source("b", "another")
    next(machine.cache.glob(f"{b'c'.hex()}*")).unlink()
    world = await machine.start(given)
    assert sorted(path.name for path in world.prepare.read) == ["b", "c"]
    assert all(a.current.state is State.RESIDENT for a in world.registry.adapters().values())


async def test_a_required_adapter_that_fails_ends_the_start(machine: Machine) -> None:
    bad = machine.source("bad")
    store = Store.in_memory(machine.cache)
    world = World(store=store)
    world.prepare.errors[bad] = AdapterCorrupt("Broken.", hint="Copy it again.")
    with pytest.raises(AdapterRefused):
        await world.registry.start({"bad": Given(bad, required=True)})
    world = World(store=store, capacity=1500)
    with pytest.raises(PoolExhausted):
        await world.registry.start({n: Given(machine.source(n), required=True) for n in ("a", "b")})
    assert not world.registry.started


async def test_others_that_fail_are_listed(machine: Machine) -> None:
    given = {name: Given(machine.source(name)) for name in ("a", "bad", "c")}
    world = World(capacity=1500)
    world.prepare.errors[given["bad"].source] = AdapterCorrupt("Broken.", hint="Copy it again.")
    await world.registry.start(given)
    assert [world.state(name) for name in given] == [State.RESIDENT, State.FAILED, State.HOST]


async def test_many_adapters_do_not_hold_up_the_start(machine: Machine) -> None:
    """They are known at once, read one after the other while the server serves, and any may be asked for."""
    given = {f"a{i}": Given(machine.source(f"a{i}"), settle=False) for i in range(12)}
    given["bad"] = Given(machine.source("bad"), settle=False)
    world = World(capacity=3500)
    world.prepare.errors[given["bad"].source] = AdapterCorrupt("Broken.", hint="Copy it again.")
    gate = world.prepare.gates[given["a0"].source] = threading.Event()
    await world.registry.start(given)
    await until(lambda: world.prepare.read)
    assert world.state("a11") is State.KNOWN
    assert (await world.registry.resolve("a11")).state is State.RESIDENT
    assert [path.name for path in world.prepare.read] == ["a0", "a11"]
    gate.set()
    await until(lambda: not world.registry._tasks._running)
    states = [adapter.current.state for adapter in world.registry.adapters().values()]
    assert (states.count(State.RESIDENT), states.count(State.HOST), states.count(State.FAILED)) == (3, 9, 1)
    assert world.state("a11") is State.RESIDENT, "what was asked for gave way to what nobody asked for"
    assert not [event for event in world.observer.events if event[0] == "evicted"]


async def test_a_change_that_a_crash_interrupted_is_carried_out(machine: Machine) -> None:
    world = await machine.start()
    await world.registry.load("a", machine.source("one"))
    two = machine.source("two")
    for source, name in ((two, "a"), (machine.source("new"), "b")):
        world.prepare.gates[source] = threading.Event()
        await world.registry.put(name, source)
    cut_off = world
    world = await machine.start()
    assert world.current("a").source == two
    assert world.state("b") is State.RESIDENT
    assert machine.store is not None and all(row.pending_source is None for row in machine.store.adapters())
    for gate in cut_off.prepare.gates.values():
        gate.set()


async def test_what_was_accepted_and_then_read_is_what_it_was_when_it_was_read(machine: Machine) -> None:
    world = await machine.start()
    source = machine.source("a")
    gate = world.prepare.gates[source] = threading.Event()
    await world.registry.put("a", source)
    cut_off = world
    world = await machine.start()
    digest = (await world.registry.resolve("a")).digest
    machine.source("a", "something else")
    assert (await machine.start()).current("a").digest == digest
    gate.set()
    await until(lambda: not cut_off.registry._tasks._running)


async def test_a_lost_artefact_is_made_again_from_its_source_and_never_another_one(machine: Machine) -> None:
    world = await machine.start()
    await world.registry.load("same", machine.source("same"))
    await world.registry.load("changed", machine.source("changed"))
    await world.registry.load("gone", machine.source("gone"))
    before = shown(world)
    shutil.rmtree(machine.cache)
    machine.cache.mkdir()
    machine.source("changed", "something else")
    world = await machine.start()
    assert shown(world)["same"] == before["same"] and world.state("same") is State.RESIDENT
    assert world.state("changed") is State.FAILED
    error = world.current("changed").error
    assert error is not None and error.code == "adapter_source_changed"


async def test_a_different_base_reads_everything_again(machine: Machine) -> None:
    world = await machine.start()
    await world.registry.load("a", machine.source("a"))
    assert machine.store is not None
    machine.store.close()
    store = Store.open(machine.folder / "state.sqlite", base="another", cache=machine.cache)
    world = World(store=store, prepare=FakePrepare(machine.cache))
    await world.registry.start({})
    assert (await world.registry.resolve("a")).digest
    assert len(world.prepare.read) == 1
    store.close()


CRASHES: list[Callable[[World, Machine], object]] = [
    lambda world, machine: world.registry.load("a", machine.source("two"), replace=True),
    lambda world, machine: world.registry.rollback("a"),
    lambda world, machine: world.registry.delete("a"),
    lambda world, machine: world.registry.pin("a"),
]


@pytest.mark.parametrize("steps", range(0, 24, 3))
@pytest.mark.parametrize("change", range(len(CRASHES)))
async def test_a_crash_at_any_instant_leaves_before_or_after(machine: Machine, change: int, steps: int) -> None:
    world = await machine.start()
    await world.registry.load("a", machine.source("zero"))
    await world.registry.load("a", machine.source("one"), replace=True)
    before = shown(world)
    task = asyncio.ensure_future(CRASHES[change](world, machine))  # type: ignore[arg-type]
    for _ in range(steps):
        await asyncio.sleep(0)
    assert machine.store is not None
    found = shown(await Machine.start(machine))  # the file as it is at this instant
    task.cancel()
    after = {
        0: {"a": (found.get("a", ("",))[0], before["a"][0], False)},
        1: {"a": (before["a"][1], before["a"][0], False)},
        2: {},
        3: {"a": (*before["a"][:2], True)},
    }[change]
    assert found in (before, after)
