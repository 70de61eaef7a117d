"""Room on the device: who is evicted for whom, who waits, and who is told that there is none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loramux.errors import LoramuxError, PoolExhausted
from loramux.registry import State, Version

from ..fakes import World, until


async def small(*names: str, capacity: int = 3000, patience_s: float = 5.0) -> World:
    """Adapters of 1000 bytes each; all of them on the host, the last ones on the device."""
    world = World(capacity=capacity, patience_s=patience_s)
    for name in names:
        await world.load(name)
    return world


def resident(world: World) -> set[str]:
    return {name for name, a in world.registry.adapters().items() if a.current.state is State.RESIDENT}


async def test_the_least_recently_used_makes_room() -> None:
    world = await small("a", "b", "c")
    await world.registry.resolve("a")
    await world.load("d")
    assert resident(world) == {"a", "c", "d"}
    assert world.state("b") is State.HOST
    assert ("evicted", "b", None) in world.observer.events
    assert world.registry.resident_bytes() == 3000 == sum(world.data_plane.resident.values())


async def test_an_evicted_version_comes_back_as_itself_without_its_source() -> None:
    world = await small("a", "b", "c", "d")
    version = world.current("a")
    before = version.tag, version.version_id
    assert version.state is State.HOST
    assert await world.registry.resolve("a") is version
    assert (version.tag, version.version_id) == before
    assert world.prepare.read.count(Path("/adapters/a")) == 1
    assert ("loaded", "a", ("host", "copy")) in world.observer.events


async def test_as_many_go_as_the_new_one_needs_and_none_if_all_would_not_do() -> None:
    world = await small("a", "b", "c")
    world.prepare.sizes = {"big": 2000, "huge": 3000}
    held = await world.hold("c")
    await world.load("big")
    assert resident(world) == {"c", "big"}
    held_big = await world.hold("big")
    world.registry.release(held)
    task = await world.registry.put("huge", Path("/adapters/huge"))
    await until(lambda: world.state("huge") is State.HOST)
    await asyncio.sleep(0.01)
    assert resident(world) == {"c", "big"}, "c was evicted, and there is no room all the same"
    world.registry.release(held_big)
    await task
    assert resident(world) == {"huge"}


async def test_neither_leased_nor_pinned_nor_waited_for_versions_go() -> None:
    world = await small("leased", "pinned", "free")
    lease = await world.hold("leased")
    await world.registry.pin("pinned")
    for name in ("x", "y"):
        await world.load(name)
        assert resident(world) == {"leased", "pinned", name}
    assert {v for v in world.data_plane.resident} >= {lease.version_id, world.current("pinned").version_id}


async def test_a_request_waits_for_room_until_a_lease_ends() -> None:
    world = await small("a", capacity=1000)
    lease = await world.hold("a")
    put = await world.registry.put("b", Path("/adapters/b"))
    asked = [asyncio.create_task(world.hold("b")) for _ in range(3)]
    await until(lambda: world.state("b") is State.HOST)
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in asked)
    world.registry.release(lease)
    assert {(await task).name for task in asked} == {"b"}
    await put
    assert resident(world) == {"b"}


async def test_a_pool_that_stays_too_small_answers_with_numbers() -> None:
    world = await small("a", capacity=1000, patience_s=0.05)
    lease = await world.hold("a")
    for _ in range(2):
        with pytest.raises(PoolExhausted) as caught:
            await world.load("b", replace=True)
        assert (caught.value.needed_bytes, caught.value.free_bytes) == (1000, 0)
        assert caught.value.retry_after_s and "--adapter-memory" in str(caught.value.hint)
    with pytest.raises(PoolExhausted):
        await world.hold("b")
    assert world.state("b") is State.HOST
    assert ("failed", "b", "adapter_memory_full") in world.observer.events
    world.registry.release(lease)
    assert (await world.hold("b")).name == "b"


@pytest.mark.parametrize("why", ["too big", "pinned"])
async def test_nobody_waits_for_room_that_cannot_come(why: str) -> None:
    world = await small("a", capacity=1000, patience_s=60)
    if why == "pinned":
        await world.registry.pin("a")
    else:
        world.prepare.sizes["b"] = 1001
    async with asyncio.timeout(1):
        with pytest.raises(PoolExhausted):
            await world.load("b")


async def test_room_that_is_in_pieces_is_made_whole() -> None:
    """The pool says full although by its own account there is room."""
    world = await small("a", "b", capacity=3000)
    world.data_plane.errors = [PoolExhausted.of(1000, 1000)]
    await world.load("c")
    assert resident(world) == {"b", "c"}


async def test_unpinning_gives_room_to_who_waits() -> None:
    world = await small("a", "b", capacity=2000)
    lease = await world.hold("b")
    await world.registry.pin("a")
    put = await world.registry.put("c", Path("/adapters/c"))
    await until(lambda: world.state("c") is State.HOST)
    await asyncio.sleep(0.01)
    assert not put.done()
    await world.registry.pin("a", pinned=False)
    await put
    assert resident(world) == {"b", "c"}
    world.registry.release(lease)


async def test_pinning_loads() -> None:
    world = await small("a", "b", capacity=1000)
    assert resident(world) == {"b"}
    assert (await world.registry.pin("a")).pinned
    await until(lambda: resident(world) == {"a"})


async def test_a_load_that_waits_for_room_ends_when_its_adapter_is_deleted() -> None:
    world = await small("a", capacity=1000)
    lease = await world.hold("a")
    put = await world.registry.put("b", Path("/adapters/b"))
    await until(lambda: world.state("b") is State.HOST)
    adapter = await world.registry.delete("b")
    async with asyncio.timeout(1):
        await put
    assert adapter.current.state is State.GONE
    world.registry.release(lease)


async def test_every_request_of_many_adapters_runs_in_a_pool_for_few() -> None:
    names = [f"a{i}" for i in range(12)]
    world = await small(*names, capacity=3000)
    served: list[str] = []

    async def request(name: str) -> None:
        version = await world.hold(name)
        assert version.version_id in world.data_plane.resident
        await asyncio.sleep(0)
        assert version.version_id in world.data_plane.resident
        world.registry.release(version)
        served.append(name)

    await asyncio.gather(*(request(name) for name in names * 10))
    assert sorted(served) == sorted(names * 10)
    assert world.registry.resident_bytes() <= 3000


async def test_memory_stays_until_the_last_of_several_requests_ends() -> None:
    world = await small("a")
    version: Version = world.current("a")
    for _ in range(3):
        await world.hold("a")
    await world.registry.delete("a")  # does not wait for them
    assert version.state is State.DRAINING
    for _ in range(2):
        world.registry.release(version)
        await asyncio.sleep(0.01)
        assert set(world.data_plane.resident) == {version.version_id}
    world.registry.release(version)
    await until(lambda: version.state is State.GONE)
    assert not world.data_plane.resident
    assert world.observer.events[-1] == ("unloaded", "a", None)


async def test_an_engine_that_cannot_unload_does_not_stop_the_rest() -> None:
    world = await small("a")

    async def broken(version_id: int) -> None:
        raise RuntimeError("EngineDeadError")

    world.data_plane.unload = broken  # type: ignore[method-assign]
    await world.registry.delete("a")
    assert world.registry.resident_bytes() == 0
    with pytest.raises(LoramuxError):
        world.data_plane.error = RuntimeError("EngineDeadError")
        await world.load("b")


async def test_who_asks_at_the_instant_a_load_ends_gets_another() -> None:
    """A task that is done is awaited without a turn of the event loop: to be given it again and again is to hang."""
    world = await small("a", "b", "c", "d")  # a is on the host
    residency = world.registry._residency
    ended = residency.load(world.current("a"), evict=False, wait=False)
    while not ended.done():
        await asyncio.sleep(0)
    # Between its end and the callbacks of its end.
    assert residency.load(world.current("a"), evict=False, wait=False) is not ended
