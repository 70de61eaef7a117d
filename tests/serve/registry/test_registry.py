"""Names and versions under load, replacement and removal; sources outside the roots."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from loramux.errors import (
    AdapterExists,
    AdapterLoading,
    AdapterNotFound,
    AdapterRefused,
    LoramuxError,
    PathNotAllowed,
    PoolExhausted,
)
from loramux.registry import AdapterEntry, State
from loramux.registry.entry import TRANSITIONS
from loramux_adapters import AdapterCorrupt

from ..fakes import BASE, World, until

A, B = Path("/adapters/a"), Path("/adapters/b")


def entry_in(state: State) -> AdapterEntry:
    return AdapterEntry(name="a", source=A, version_id=1, state=state)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_an_entry_moves_along_the_table_only(old: State, new: State) -> None:
    entry = entry_in(old)
    if new in TRANSITIONS[old]:
        entry.move(new)
        assert entry.state is new
        assert entry.settled.is_set() == (new in (State.RESIDENT, State.FAILED))
    else:
        with pytest.raises(ValueError, match="cannot go from"):
            entry.move(new)
        assert entry.state is old


def test_every_state_is_reached_from_known_and_only_gone_is_final() -> None:
    reached = {State.KNOWN}
    while more := set().union(*(TRANSITIONS[s] for s in reached)) - reached:
        reached |= more
    assert reached == set(State)
    assert [state for state in State if not TRANSITIONS[state]] == [State.GONE]


async def test_a_name_is_published_only_once_it_is_resident() -> None:
    world = World()
    world.data_plane.gate.clear()
    load = asyncio.create_task(world.registry.load("a", A))
    await until(lambda: (e := world.registry.entries().get("a")) and e.state is State.HOST)
    assert world.directory.names == {}
    assert world.registry.resident("a") is None
    world.data_plane.gate.set()
    entry = await load
    assert world.directory.names == {"a": entry}
    assert world.registry.resident("a") is entry
    assert entry.resident_bytes == 1000
    assert set(entry.load_seconds) == {"prepare", "copy"}
    assert world.observer.events == [("loaded", "a", 1000)]


@pytest.mark.parametrize("name", ["a", BASE])
async def test_a_taken_name_is_refused_without_reading_anything(name: str) -> None:
    world = World()
    await world.registry.load("a", A)
    with pytest.raises(AdapterExists):
        await world.registry.load(name, B)
    assert world.prepare.read == [A]


async def test_replace_switches_before_it_drains() -> None:
    world = World()
    old = await world.registry.load("a", A)
    old.acquire()
    new = await world.registry.load("a", B, replace=True)
    assert world.directory.names["a"] is new
    assert (old.state, new.state) == (State.DRAINING, State.RESIDENT)
    assert world.data_plane.resident == {old.version_id, new.version_id}
    old.release()
    await until(lambda: old.state is State.GONE)
    assert world.data_plane.log == [("load", old.version_id), ("load", new.version_id), ("unload", old.version_id)]
    # The name is still served: its gauges stay.
    assert ("unloaded", "a", None) not in world.observer.events


async def test_the_same_content_under_the_same_name_is_another_version() -> None:
    world = World()
    old = await world.registry.load("a", A)
    old.acquire()
    new = await world.registry.load("a", A, replace=True)
    assert new.version == old.version
    assert new.version_id != old.version_id
    old.release()
    await until(lambda: old.state is State.GONE)
    assert world.registry.resident("a") is new
    assert world.data_plane.resident == {new.version_id}


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (AdapterCorrupt("Broken.", hint="Copy it again."), AdapterRefused, "adapter_corrupt"),
        (PermissionError(13, "Permission denied", str(B / "x")), AdapterRefused, "adapter_unreadable"),
        (MemoryError(), LoramuxError, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_a_failed_replacement_leaves_the_old_version_serving(
    error: Exception, kind: type[LoramuxError], code: str
) -> None:
    world = World()
    old = await world.registry.load("a", A)
    world.prepare.errors[B] = error
    with pytest.raises(kind) as caught:
        await world.registry.load("a", B, replace=True)
    assert caught.value.code == code
    assert world.registry.resident("a") is old
    assert world.directory.names["a"] is old
    assert world.data_plane.resident == {old.version_id}
    assert ("failed", "a", code) in world.observer.events


async def test_a_failed_load_is_listed_and_may_be_tried_again() -> None:
    world = World()
    world.data_plane.error = PoolExhausted("full")
    with pytest.raises(PoolExhausted):
        await world.registry.load("a", A)
    assert world.registry.entries()["a"].state is State.FAILED
    assert world.directory.names == {}
    world.data_plane.error = None
    assert (await world.registry.load("a", A)).state is State.RESIDENT


async def test_no_failure_leaves_a_name_on_its_way() -> None:
    """Also one nobody thought of: else the name would wait, and be refused as taken, for ever."""
    world = World()
    world.data_plane.error = ZeroDivisionError("a bug")
    with pytest.raises(LoramuxError) as caught:
        await world.registry.load("a", A)
    assert caught.value.status == 500
    assert "a bug" not in caught.value.message
    assert world.registry.entries()["a"].state is State.FAILED


async def test_the_error_of_a_failed_load_names_no_host_path() -> None:
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

    def prepare(source: Path) -> None:
        weights = Tensor()
        alive.append(weakref.ref(weights))
        raise AdapterCorrupt("Broken.", hint="Copy it again.")

    world.registry._prepare = prepare  # type: ignore[assignment]
    with pytest.raises(AdapterRefused):
        await world.registry.load("a", A)
    gc.collect()
    assert world.registry.entries()["a"].error is not None
    assert alive[0]() is None


async def test_memory_stays_until_the_last_of_several_requests_ends() -> None:
    world = World()
    entry = await world.registry.load("a", A)
    for _ in range(3):
        entry.acquire()
    assert await world.registry.unload("a") is entry  # does not wait for them
    assert world.directory.names == {}
    assert entry.state is State.DRAINING
    for _ in range(2):
        entry.release()
        await asyncio.sleep(0.01)
        assert world.data_plane.resident == {entry.version_id}
    entry.release()
    await until(lambda: entry.state is State.GONE)
    assert world.data_plane.resident == set()
    assert world.observer.events[-1] == ("unloaded", "a", None)


async def test_an_idle_adapter_is_gone_when_unload_returns() -> None:
    world = World()
    entry = await world.registry.load("a", A)
    await world.registry.unload("a")
    assert (entry.state, entry.resident_bytes) == (State.GONE, 0)
    assert world.data_plane.resident == set()
    with pytest.raises(AdapterNotFound):
        await world.registry.unload("a")


async def test_a_name_can_be_loaded_again_while_its_last_version_drains() -> None:
    world = World()
    old = await world.registry.load("a", A)
    old.acquire()
    await world.registry.unload("a")
    new = await world.registry.load("a", B)
    old.release()
    await until(lambda: old.state is State.GONE)
    assert world.data_plane.resident == {new.version_id}
    assert ("unloaded", "a", None) not in world.observer.events


async def test_of_concurrent_loads_of_one_name_one_wins() -> None:
    world = World()
    results = await asyncio.gather(
        *(world.registry.load("a", Path(f"/adapters/{i}")) for i in range(8)), return_exceptions=True
    )
    entries = [r for r in results if isinstance(r, AdapterEntry)]
    assert len(entries) == 1
    assert all(isinstance(r, AdapterExists) for r in results if r is not entries[0])
    assert world.data_plane.resident == {entries[0].version_id}


async def test_concurrent_replacements_end_with_one_version_and_no_leak() -> None:
    world = World()
    await asyncio.gather(*(world.registry.load("a", Path(f"/adapters/{i}"), replace=True) for i in range(8)))
    current = world.registry.resident("a")
    assert current is not None
    await until(lambda: world.data_plane.resident == {current.version_id})
    assert world.directory.names["a"] is current


async def test_unload_during_a_load_takes_effect_after_it() -> None:
    world = World()
    world.data_plane.gate.clear()
    load = asyncio.create_task(world.registry.load("a", A))
    await until(lambda: "a" in world.registry.entries())
    unload = asyncio.create_task(world.registry.unload("a"))
    await asyncio.sleep(0.01)
    world.data_plane.gate.set()
    assert await load is await unload
    assert world.registry.entries() == {}
    assert world.data_plane.resident == set()


async def test_loads_of_other_names_do_not_wait() -> None:
    world = World()
    world.prepare.gates[A] = threading.Event()
    slow = asyncio.create_task(world.registry.load("slow", A))
    await until(lambda: world.prepare.read)
    other = await world.registry.load("other", B)
    assert await world.registry.resolve("other") is other
    assert not slow.done()
    world.prepare.gates[A].set()
    await slow


@pytest.mark.parametrize("stage", ["reading", "copying"])
async def test_a_caller_that_leaves_does_not_stop_the_load(stage: str) -> None:
    world = World()
    world.prepare.gates[A] = threading.Event()
    world.data_plane.gate.clear()
    if stage == "copying":
        world.prepare.gates[A].set()
    load = asyncio.create_task(world.registry.load("a", A))
    on_its_way = State.VERIFYING if stage == "reading" else State.HOST
    await until(lambda: (e := world.registry.entries().get("a")) and e.state is on_its_way)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    world.prepare.gates[A].set()
    world.data_plane.gate.set()
    assert (await world.registry.resolve("a")).state is State.RESIDENT


async def test_a_caller_that_leaves_does_not_stop_the_unload() -> None:
    world = World()
    entry = await world.registry.load("a", A)
    world.data_plane.gate.clear()
    unload = asyncio.create_task(world.registry.unload("a"))
    await until(lambda: entry.state is State.DRAINING)
    unload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unload
    world.data_plane.gate.set()
    await until(lambda: entry.state is State.GONE)
    assert world.data_plane.resident == set()


async def test_resolve_waits_while_the_adapter_loads() -> None:
    world = World()
    world.data_plane.gate.clear()
    load = asyncio.create_task(world.registry.load("a", A))
    await until(lambda: "a" in world.registry.entries())
    waiting = [asyncio.create_task(world.registry.resolve("a")) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    world.data_plane.gate.set()
    entry = await load
    assert await asyncio.gather(*waiting) == [entry] * 3


async def test_resolve_gives_up_after_its_patience() -> None:
    world = World(patience_s=0.02)
    world.data_plane.gate.clear()
    load = asyncio.create_task(world.registry.load("a", A))
    await until(lambda: "a" in world.registry.entries())
    with pytest.raises(AdapterLoading) as caught:
        await world.registry.resolve("a")
    assert caught.value.retry_after_s
    world.data_plane.gate.set()
    await load


async def test_resolve_raises_what_the_load_ended_with() -> None:
    world = World()
    world.prepare.errors[A] = AdapterCorrupt("Broken.", hint="Copy it again.")
    with pytest.raises(AdapterRefused):
        await world.registry.load("a", A)
    depths = []
    for _ in range(3):
        with pytest.raises(AdapterRefused) as caught:
            await world.registry.resolve("a")
        assert (caught.value.message, caught.value.code) == ("Broken.", "adapter_corrupt")
        depths.append(len(caught.traceback))
    assert len(set(depths)) == 1, "the stored error collects the frames of every request"


async def test_resolve_never_returns_a_version_that_is_no_longer_served() -> None:
    world = World()
    world.data_plane.gate.clear()
    load = asyncio.create_task(world.registry.load("a", A))
    await until(lambda: "a" in world.registry.entries())
    waiting = asyncio.create_task(world.registry.resolve("a"))
    unload = asyncio.create_task(world.registry.unload("a"))
    await asyncio.sleep(0.01)
    world.data_plane.gate.set()
    entry = await load
    with contextlib.suppress(AdapterNotFound):  # as good: it lost the race with the unload
        assert await waiting is entry
    await unload
    with pytest.raises(AdapterNotFound):
        await world.registry.resolve("a")


@pytest.mark.parametrize("call", ["resolve", "unload"])
async def test_an_unknown_name_proposes_close_ones(call: str) -> None:
    world = World()
    for name in ("support-bot", "sql-writer"):
        await world.registry.load(name, Path("/adapters") / name)
    method: Callable[[str], Awaitable[object]] = getattr(world.registry, call)
    with pytest.raises(AdapterNotFound) as caught:
        await method("suport-bot")
    assert caught.value.hint is not None
    assert "'support-bot'" in caught.value.hint
    assert "sql-writer" not in caught.value.hint


async def test_names_that_nobody_has_leave_nothing_behind() -> None:
    world = World()
    for i in range(20):
        with pytest.raises(AdapterNotFound):
            await world.registry.unload(f"guess-{i}")
    assert not world.registry._locks


def test_an_endless_name_costs_a_short_answer() -> None:
    assert len(World().registry.not_found("x" * 10**6).message) < 300


class TestRoots:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "root"
        (root / "a").mkdir(parents=True)
        (tmp_path / "outside").mkdir()
        (tmp_path / "root-too").mkdir()  # shares the root's name as a prefix
        return root

    def test_a_folder_under_a_root_is_allowed(self, root: Path) -> None:
        check = World(roots=(root,)).registry.check_source
        assert check(root / "a") == root / "a"
        assert check(root / "a" / ".." / "a") == root / "a"

    @pytest.mark.parametrize(
        "path", ["../outside", "a/../../outside", "/etc", "../root-too", "~", "~nobody-has-this-name/x", "a\0b"]
    )
    def test_a_path_out_of_every_root_is_refused(self, root: Path, path: str) -> None:
        with pytest.raises(PathNotAllowed) as caught:
            World(roots=(root,)).registry.check_source(root / path if path[0] != "~" else Path(path))
        assert str(root) not in str(caught.value)

    def test_a_link_out_of_a_root_is_refused(self, root: Path) -> None:
        (root / "link").symlink_to(root.parent / "outside")
        with pytest.raises(PathNotAllowed):
            World(roots=(root,)).registry.check_source(root / "link")

    def test_a_loop_of_links_is_refused(self, root: Path) -> None:
        (root / "loop").symlink_to(root / "loop")
        with pytest.raises(PathNotAllowed):
            World(roots=(root,)).registry.check_source(root / "loop" / "a")

    def test_a_root_may_itself_be_a_link(self, root: Path) -> None:
        link = root.parent / "link"
        link.symlink_to(root)
        assert World(roots=(link,)).registry.check_source(link / "a") == root / "a"

    def test_without_roots_nothing_is_allowed(self, root: Path) -> None:
        with pytest.raises(PathNotAllowed):
            World().registry.check_source(root / "a")
