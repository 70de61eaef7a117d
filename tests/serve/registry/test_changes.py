"""Put, delete and roll back while requests run: what a name means, and what survives."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import pytest

from loramux.errors import (
    AdapterBusy,
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    LoramuxError,
    NoPreviousVersion,
    PoolExhausted,
    PreconditionFailed,
    StateNotWritten,
)
from loramux.registry import Adapter, State
from loramux_adapters import AdapterCorrupt

from ..fakes import World, until

ONE, TWO = Path("/adapters/one"), Path("/adapters/two")


def digests(world: World, name: str = "a") -> tuple[str | None, str | None]:
    """What is served, and what is kept, as the state file has it."""
    row = {row.name: row for row in world.store.adapters()}[name]
    return row.digest and row.digest[:16], row.previous_digest and row.previous_digest[:16]


async def test_a_replacement_serves_before_the_old_one_goes() -> None:
    world = World()
    one = await world.load("a", "one")
    lease = await world.hold("a")
    world.data_plane.gate.clear()
    put = await world.registry.put("a", TWO)
    adapter = world.registry.adapter("a")
    await until(lambda: adapter.pending and adapter.pending.state is State.HOST)
    assert world.registry.lookup("a") is one
    world.data_plane.gate.set()
    assert await put is adapter
    two = adapter.current
    assert (one.state, two.state, adapter.previous, adapter.pending) == (State.DRAINING, State.RESIDENT, one, None)
    assert digests(world) == (two.digest, one.digest)
    world.registry.release(lease)
    await until(lambda: one.state is State.HOST)
    assert world.data_plane.log == [("load", 1), ("load", 2), ("unload", 1)]
    assert ("unloaded", "a", None) not in world.observer.events


async def test_the_same_content_is_the_same_version() -> None:
    world = World()
    one = await world.load("a", "one")
    world.prepare.contents[TWO] = "one"
    adapter = await (await world.registry.put("a", TWO))
    assert (adapter.current, adapter.previous) == (one, None)
    assert one.source == TWO
    assert world.data_plane.log == [("load", 1)]
    assert +world.observer.states == {("a", State.RESIDENT): 1}


async def test_putting_the_previous_content_is_a_rollback() -> None:
    world = World()
    one = await world.load("a", "one")
    two = await world.load("a", "two", replace=True)
    assert await world.load("a", "one", replace=True) is one
    assert world.registry.adapter("a").previous is two
    assert digests(world) == (one.digest, two.digest)


async def test_only_one_previous_version_is_kept() -> None:
    world = World()
    versions = [await world.load("a", content, replace=True) for content in ("one", "two", "three")]
    await until(lambda: set(world.data_plane.resident) == {versions[2].version_id})
    assert [v.state for v in versions] == [State.GONE, State.HOST, State.RESIDENT]
    assert len({v.version_id for v in versions}) == 3


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (AdapterCorrupt("Broken.", hint="Copy it again."), AdapterRefused, "adapter_corrupt"),
        (PermissionError(13, "Permission denied", str(TWO / "x")), AdapterRefused, "adapter_unreadable"),
        (MemoryError(), LoramuxError, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_a_refused_replacement_leaves_the_old_version_serving(
    error: Exception, kind: type[LoramuxError], code: str
) -> None:
    world = World()
    one = await world.load("a", "one")
    world.prepare.errors[TWO] = error
    with pytest.raises(kind) as caught:
        await world.load("a", "two", replace=True)
    assert caught.value.code == code
    adapter = world.registry.adapter("a")
    assert (adapter.current, adapter.pending, world.registry.lookup("a")) == (one, None, one)
    assert adapter.error is not None and adapter.error.code == code
    assert set(world.data_plane.resident) == {one.version_id}
    assert ("failed", "a", code) in world.observer.events
    assert world.store.adapters()[0].pending_source is None
    assert +world.observer.states == {("a", State.RESIDENT): 1}
    del world.prepare.errors[TWO]
    await world.load("a", "two", replace=True)
    assert adapter.error is None


async def test_a_replacement_that_the_device_refuses_leaves_the_old_version_serving() -> None:
    world = World()
    one = await world.load("a", "one")
    world.data_plane.errors = [AdapterRefused("No.", code="adapter_unservable")]
    with pytest.raises(AdapterRefused):
        await world.load("a", "two", replace=True)
    assert world.registry.lookup("a") is one
    assert digests(world) == (one.digest, None)


async def test_where_both_do_not_fit_the_new_one_takes_the_place_of_the_old() -> None:
    world = World(capacity=1000)
    one = await world.load("a", "one")
    lease = await world.hold("a")
    put = await world.registry.put("a", TWO)
    adapter = world.registry.adapter("a")
    await until(lambda: adapter.current is not one)
    assert (one.state, adapter.current.state) == (State.DRAINING, State.HOST)
    asked = asyncio.create_task(world.hold("a"))
    await asyncio.sleep(0.01)
    assert not asked.done() and not put.done()
    world.registry.release(lease)
    assert await asked is adapter.current
    await put
    assert (one.state, adapter.current.state) == (State.HOST, State.RESIDENT)


async def test_a_new_version_that_could_never_fit_leaves_the_old_one_serving() -> None:
    world = World(capacity=1500)
    world.prepare.sizes = {"two": 1501}
    one = await world.load("a", "one")
    with pytest.raises(PoolExhausted):
        await world.load("a", "two", replace=True)
    assert world.registry.lookup("a") is one
    assert digests(world) == (one.digest, None)


async def test_pinned_is_the_name_not_the_version() -> None:
    world = World()
    await (await world.registry.put("a", ONE, pinned=True))
    one = world.current("a")
    assert one.pinned
    two = await world.load("a", "two", replace=True)
    assert (one.pinned, two.pinned) == (False, True)
    await (await world.registry.put("a", TWO, pinned=False))
    assert not two.pinned and not world.store.adapters()[0].pinned


async def test_a_pinned_name_that_failed_is_pinned_when_it_is_put_again() -> None:
    world = World()
    world.prepare.errors[ONE] = AdapterCorrupt("Broken.", hint="Copy it again.")
    with pytest.raises(AdapterRefused):
        await (await world.registry.put("a", ONE, pinned=True))
    assert (await world.load("a", "two")).pinned


async def test_rollback_and_back() -> None:
    world = World()
    one = await world.load("a", "one")
    with pytest.raises(NoPreviousVersion):
        await world.registry.rollback("a")
    two = await world.load("a", "two", replace=True)
    for current, previous in ((one, two), (two, one)):
        adapter = await world.registry.rollback("a")
        assert (adapter.current, adapter.previous) == (current, previous)
        assert current.state is State.RESIDENT
        assert digests(world) == (current.digest, previous.digest)
    assert world.prepare.read == [ONE, TWO]


async def test_rollback_to_a_version_that_still_drains_is_at_once() -> None:
    world = World()
    one = await world.load("a", "one")
    lease = await world.hold("a")
    await world.load("a", "two", replace=True)
    world.data_plane.gate.clear()  # nothing can be loaded now
    rollback = asyncio.create_task(world.registry.rollback("a"))
    await until(lambda: world.current("a") is one)
    assert one.state is State.RESIDENT
    world.data_plane.gate.set()
    await rollback
    world.registry.release(lease)
    assert one.state is State.RESIDENT


async def test_delete_withdraws_at_once_and_frees_what_nobody_uses() -> None:
    world = World()
    one = await world.load("a", "one")
    await world.load("a", "two", replace=True)
    adapter = await world.registry.delete("a")
    assert {v.state for v in adapter.versions()} == {State.GONE}
    assert not world.data_plane.resident and not world.store.adapters()
    assert +world.observer.states == {}
    with pytest.raises(AdapterNotFound):
        await world.registry.delete("a")
    with pytest.raises(AdapterNotFound):
        await world.registry.resolve(one.tag)


async def test_a_name_can_be_put_again_while_its_last_version_drains() -> None:
    world = World()
    one = await world.load("a", "one")
    lease = await world.hold("a")
    await world.registry.delete("a")
    again = await world.load("a", "one")
    assert again is not one and again.version_id != one.version_id
    world.registry.release(lease)
    await until(lambda: one.state is State.GONE)
    assert set(world.data_plane.resident) == {again.version_id}
    assert ("unloaded", "a", None) not in world.observer.events


async def test_of_concurrent_loads_of_one_name_one_wins() -> None:
    world = World()
    results = await asyncio.gather(*(world.load("a", str(i)) for i in range(8)), return_exceptions=True)
    assert sum(isinstance(r, AdapterExists) for r in results) == 7
    assert len(world.data_plane.resident) == 1


async def test_concurrent_changes_take_turns_and_leak_nothing() -> None:
    world = World()

    async def change(i: int) -> None:
        try:
            if i % 4 == 3:
                await world.registry.delete("a")
            elif i % 4 == 2:
                await world.registry.rollback("a")
            else:
                await world.load("a", str(i), replace=True)
        except (AdapterNotFound, NoPreviousVersion):
            pass

    await asyncio.gather(*(change(i) for i in range(24)))
    await world.load("a", "last", replace=True)
    current = world.current("a")
    await until(lambda: set(world.data_plane.resident) == {current.version_id})
    assert digests(world)[0] == current.digest
    assert len(world.registry._changes.turns) == 0


async def test_a_turn_that_does_not_come_in_time_changes_nothing() -> None:
    world = World()
    world.prepare.gates[ONE] = threading.Event()
    first = await world.registry.put("a", ONE, turn_s=0)  # its own turn is free
    with pytest.raises(AdapterBusy) as caught:
        await world.registry.put("a", TWO, turn_s=0)
    assert caught.value.retry_after_s
    world.prepare.gates[ONE].set()
    await first
    assert world.prepare.read == [ONE]
    assert len(world.registry._changes.turns) == 0


async def test_a_condition_is_checked_when_it_is_ones_turn() -> None:
    world = World()
    seen: list[str | None] = []

    def condition(adapter: Adapter | None) -> None:
        seen.append(adapter.current.digest if adapter else None)
        if len(seen) == 3:
            raise PreconditionFailed("No.")

    puts = [world.registry.put("a", Path("/adapters") / str(i), condition=condition) for i in range(3)]
    results = await asyncio.gather(*puts, return_exceptions=True)
    assert isinstance(results[2], PreconditionFailed)
    assert seen[0] is None and seen[1] is not None and seen[2] not in (None, seen[1])
    for call in (world.registry.delete, world.registry.rollback):
        seen[:] = ["", ""]
        with pytest.raises(PreconditionFailed):
            await call("a", condition=condition)
    assert world.prepare.read == [Path("/adapters/0"), Path("/adapters/1")]


async def test_delete_during_a_put_takes_effect_after_it() -> None:
    world = World()
    world.prepare.gates[ONE] = threading.Event()
    put = await world.registry.put("a", ONE)
    delete = asyncio.create_task(world.registry.delete("a"))
    await asyncio.sleep(0.01)
    world.prepare.gates[ONE].set()
    assert await put is await delete
    await until(lambda: not world.data_plane.resident)
    assert world.registry.adapters() == {}
    assert +world.observer.states == {}


async def test_changes_of_other_names_do_not_wait() -> None:
    world = World()
    world.prepare.gates[ONE] = threading.Event()
    slow = await world.registry.put("slow", ONE)
    await world.load("other")
    assert not slow.done()
    world.prepare.gates[ONE].set()
    await slow


@pytest.mark.parametrize("call", ["load", "delete", "rollback"])
async def test_a_caller_that_leaves_does_not_stop_a_change(call: str) -> None:
    world = World()
    await world.load("a", "one")
    await world.load("a", "two", replace=True)
    await until(lambda: len(world.data_plane.resident) == 1)
    world.data_plane.gate.clear()
    work = {
        "load": lambda: world.load("a", "three", replace=True),
        "delete": lambda: world.registry.delete("a"),
        "rollback": lambda: world.registry.rollback("a"),
    }[call]()
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    world.data_plane.gate.set()
    if call == "delete":
        await until(lambda: not world.data_plane.resident)
    else:
        await until(lambda: (v := world.current("a")).version_id != 2 and v.state is State.RESIDENT)


async def test_a_failed_put_is_listed_and_may_be_tried_again() -> None:
    world = World()
    world.prepare.errors[ONE] = AdapterCorrupt("Broken.", hint="Copy it again.")
    with pytest.raises(AdapterRefused):
        await world.load("a", "one")
    failed = world.current("a")
    assert failed.state is State.FAILED
    del world.prepare.errors[ONE]
    assert (await world.load("a", "one")).state is State.RESIDENT
    assert failed.state is State.GONE
    assert +world.observer.states == {("a", State.RESIDENT): 1}


async def test_after_a_failure_the_previous_content_may_be_put_again() -> None:
    world = World()
    await world.load("a", "one")
    await world.load("a", "two", replace=True)
    await until(lambda: len(world.data_plane.resident) == 1)
    two = world.current("a")
    world.data_plane.capacity = world.registry._residency._capacity_bytes = 1000
    await world.load("b")  # two is evicted, then lost
    world.data_plane.errors = [AdapterRefused("Damaged.", code="adapter_unreadable")]
    world.prepare.contents[TWO] = "something else"
    with pytest.raises(AdapterRefused):
        await world.registry.resolve("a")
    again = await world.load("a", "one", replace=True)
    adapter = world.registry.adapter("a")
    assert (two.state, adapter.previous, adapter.current.error) == (State.GONE, None, None)
    assert await world.registry.resolve(f"a@{again.digest}") is again


async def test_a_full_pool_is_told_until_there_is_room() -> None:
    world = World(capacity=1000, patience_s=0.02)
    await world.load("a")
    held = await world.hold("a")
    with pytest.raises(PoolExhausted):
        await world.load("b")
    assert isinstance(world.current("b").error, PoolExhausted)
    world.registry.release(held)
    await world.load("b")  # not taken: it was never there
    assert world.current("b").error is None


async def test_what_cannot_be_written_down_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    one = await world.load("a", "one")
    await world.load("a", "two", replace=True)
    before = world.store.adapters()

    def full(*_: object) -> None:
        raise StateNotWritten("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "save", full)
        patch.setattr(world.store, "delete", full)
        for change in (
            world.load("a", "three", replace=True),
            world.load("b"),
            world.registry.delete("a"),
            world.registry.rollback("a"),
            world.registry.pin("a"),
        ):
            with pytest.raises(StateNotWritten):
                await change
    adapter = world.registry.adapter("a")
    assert adapter.previous is one and not adapter.pinned and adapter.current.state is State.RESIDENT
    assert set(world.registry.adapters()) == {"a"}
    assert world.store.adapters() == before
    await world.load("a", "three", replace=True)


async def test_an_error_names_no_path_of_the_host() -> None:
    world = World()
    secret = Path("/srv/tenants/of-this-host/a")
    world.prepare.errors[secret] = AdapterCorrupt(f"Adapter folder '{secret}' is broken.", hint="Fix it.")
    with pytest.raises(AdapterRefused) as caught:
        await world.registry.load("a", secret)
    assert "tenants" not in str(caught.value)
    assert "'a' is broken" in caught.value.message


async def test_a_listed_failure_keeps_nothing_of_the_reader_alive() -> None:
    class Tensor:
        pass

    world, alive = World(), []

    def prepare(source: Path, **_: object) -> None:
        weights = Tensor()
        alive.append(weakref.ref(weights))
        raise AdapterCorrupt("Broken.", hint="Copy it again.")

    world.registry._reader._prepare = prepare  # type: ignore[assignment]
    with pytest.raises(AdapterRefused):
        await world.load("a")
    gc.collect()
    assert world.current("a").error is not None
    assert alive[0]() is None
