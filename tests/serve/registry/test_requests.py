"""Requests wait for their adapter, hold it while they run, and share its load."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from loramux.errors import AdapterLoading, AdapterNotFound, AdapterRefused, LoramuxError
from loramux.registry import Given, State
from loramux_adapters import AdapterCorrupt

from ..fakes import World, until

A = Path("/adapters/a")


async def known(world: World, *names: str) -> None:
    """Adapters of the start that nobody has read yet."""
    await world.registry._startup.restore({name: Given(Path("/adapters") / name, settle=False) for name in names})


async def test_the_first_request_reads_checks_and_loads_for_all() -> None:
    world = World()
    await known(world, "a")
    assert world.registry.lookup("a") is None
    versions = await asyncio.gather(*(world.hold("a") for _ in range(8)))
    assert len(set(versions)) == 1
    assert versions[0].leases == 8
    assert world.prepare.read == [A]
    assert world.data_plane.log == [("load", versions[0].version_id)]
    assert ("loaded", "a", ("source", "copy", "read", "verify")) in world.observer.events
    assert world.observer.leased == {"a": 8}
    assert {name for name, _ in world.observer.waits} == {"a"}
    for version in versions:
        world.registry.release(version)
    assert world.observer.leased == {"a": 0}


async def test_a_resident_adapter_is_not_waited_for() -> None:
    world = World()
    await world.load("a")
    world.registry.release(await world.hold("a"))
    assert world.observer.waits == []


async def test_states_on_the_way_are_seen() -> None:
    world = World()
    await known(world, "a")
    world.prepare.gates[A] = threading.Event()
    world.data_plane.gate.clear()
    asked = asyncio.create_task(world.registry.resolve("a"))
    await until(lambda: world.state("a") is State.READING)
    world.prepare.gates[A].set()
    await until(lambda: world.state("a") is State.HOST)
    assert not asked.done()
    world.data_plane.gate.set()
    assert (await asked).state is State.RESIDENT
    assert set(world.current("a").load_seconds) == {"read", "verify", "copy"}


@pytest.mark.parametrize("stage", ["reading", "copying"])
async def test_waiting_has_an_end(stage: str) -> None:
    world = World(patience_s=0.05)
    await known(world, "a")
    gate = world.prepare.gates[A] = threading.Event()
    world.data_plane.gate.clear()
    if stage == "copying":
        gate.set()
    with pytest.raises(AdapterLoading) as caught:
        await world.registry.resolve("a")
    assert caught.value.retry_after_s
    gate.set()
    world.data_plane.gate.set()
    assert (await world.registry.resolve("a")).state is State.RESIDENT


@pytest.mark.parametrize("stage", ["reading", "copying"])
async def test_a_client_that_leaves_stops_nobodys_load(stage: str) -> None:
    world = World()
    await known(world, "a")
    gate = world.prepare.gates[A] = threading.Event()
    world.data_plane.gate.clear()
    if stage == "copying":
        gate.set()
    first, second = (asyncio.create_task(world.hold("a")) for _ in range(2))
    await until(lambda: world.state("a") is (State.READING if stage == "reading" else State.HOST))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.set()
    world.data_plane.gate.set()
    version = await second
    assert (version.leases, version.waiting) == (1, 0)


async def test_what_a_load_ended_with_is_raised_to_all_who_ask() -> None:
    world = World()
    await known(world, "a")
    world.prepare.errors[A] = AdapterCorrupt("Broken.", hint="Copy it again.")
    depths = []
    for _ in range(3):
        with pytest.raises(AdapterRefused) as caught:
            await world.registry.resolve("a")
        assert (caught.value.message, caught.value.code) == ("Broken.", "adapter_corrupt")
        depths.append(len(caught.traceback))
    assert max(depths) <= depths[1] + 1, "the stored error collects the frames of every request"
    assert world.prepare.read == [A]


async def test_a_failure_of_the_engine_may_go_better_the_next_time() -> None:
    world = World()
    await known(world, "a")
    world.data_plane.errors = [ZeroDivisionError("a bug")]
    with pytest.raises(LoramuxError) as caught:
        await world.registry.resolve("a")
    assert caught.value.status == 500
    assert "a bug" not in caught.value.message
    assert world.state("a") is State.HOST
    assert (await world.registry.resolve("a")).error is None


async def test_what_the_device_refuses_is_refused_for_good() -> None:
    world = World()
    await known(world, "a")
    world.data_plane.errors = [AdapterRefused("No.", code="adapter_unservable")]
    for _ in range(2):
        with pytest.raises(AdapterRefused):
            await world.registry.resolve("a")
    assert world.state("a") is State.FAILED


async def test_a_request_that_waits_moves_on_with_its_name() -> None:
    """Deleted meanwhile: 404. Replaced meanwhile: the new one."""
    world = World()
    await known(world, "a", "b")
    world.data_plane.gate.clear()
    deleted, replaced = (asyncio.create_task(world.hold(name)) for name in ("a", "b"))
    await until(lambda: world.state("b") is State.HOST and world.state("a") is State.HOST)
    delete = asyncio.create_task(world.registry.delete("a"))
    put = await world.registry.put("b", Path("/adapters/new"))
    await asyncio.sleep(0.01)
    world.data_plane.gate.set()
    await delete
    with pytest.raises(AdapterNotFound):
        await deleted
    await put
    version = await replaced  # the old one, if it came first: then it drains
    assert version.state is (State.RESIDENT if version is world.current("b") else State.DRAINING)
    assert version.leases == 1


async def test_a_version_asked_for_by_digest_is_kept_or_not_found() -> None:
    world = World()
    one = await world.load("a", "one")
    await world.load("a", "two", replace=True)
    assert await world.registry.lease(one.tag, exact=True) is one
    assert await world.registry.lease(one.tag, exact=False) is world.current("a")
    await world.load("a", "three", replace=True)
    with pytest.raises(AdapterNotFound):
        await world.registry.lease(one.tag, exact=True)
    assert one.state is State.DRAINING
    world.registry.release(one)
    await until(lambda: one.state is State.GONE)


async def test_a_draining_version_is_called_back_by_its_digest() -> None:
    world = World()
    one = await world.load("a", "one")
    held = await world.hold("a")
    await world.load("a", "two", replace=True)
    assert held is one and one.state is State.DRAINING
    assert await world.hold(f"a@{one.digest}") is one
    assert one.state is State.RESIDENT
    world.registry.release(one)
    world.registry.release(one)
    assert world.data_plane.log.count(("load", one.version_id)) == 1


async def test_a_lost_artefact_is_read_from_its_source_once_more() -> None:
    world = World()
    await known(world, "a")
    lost = AdapterRefused("Damaged.", code="adapter_unreadable")
    world.data_plane.errors = [lost]
    version = await world.registry.resolve("a")
    assert world.prepare.read == [A, A]
    assert version.error is None and world.observer.events[-1][2][0] == "source"


async def test_a_lost_artefact_whose_source_has_changed_is_not_replaced_behind_the_callers_back() -> None:
    world = World()
    await known(world, "a")
    world.data_plane.gate.clear()
    asked = asyncio.create_task(world.registry.resolve("a"))
    await until(lambda: world.state("a") is State.HOST)
    world.prepare.contents[A] = "other content"
    world.data_plane.errors = [AdapterRefused("Damaged.", code="adapter_unreadable")]
    world.data_plane.gate.set()
    with pytest.raises(AdapterRefused) as caught:
        await asked
    assert caught.value.code == "adapter_source_changed"
    assert world.state("a") is State.FAILED


async def test_an_artefact_that_stays_unreadable_fails() -> None:
    world = World()
    await known(world, "a")
    world.data_plane.error = AdapterRefused("Damaged.", code="adapter_unreadable")
    with pytest.raises(AdapterRefused):
        await world.registry.resolve("a")
    assert world.prepare.read == [A, A]
    assert world.state("a") is State.FAILED


async def test_a_few_sources_are_read_at_once_and_no_more() -> None:
    world = World()
    names = [f"a{i}" for i in range(6)]
    await known(world, *names)
    gates = [world.prepare.gates.setdefault(Path("/adapters") / name, threading.Event()) for name in names]
    asked = [asyncio.create_task(world.registry.resolve(name)) for name in names]
    await until(lambda: len(world.prepare.read) == 2)
    await asyncio.sleep(0.01)
    assert len(world.prepare.read) == 2
    for gate in gates:
        gate.set()
    await asyncio.gather(*asked)
