"""Sums and mixtures of adapters as versions: made once, shared, leased, evicted, forgotten."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from loramux.errors import AdapterLoading, AdapterNotFound, AdapterRefused, InvalidRequest, LoramuxError
from loramux.registry import Given, Held, Share, State, Version
from loramux.registry.compositions import COMPOSED, KEPT
from loramux_adapters import AdapterCorrupt, AdapterUnsupportedFeature
from loramux_adapters.compose.prepared import Router

from ..fakes import FakeCompose, World, until

PARTS = [("a", 0.7), ("b", 0.3)]


async def two() -> World:
    world = World()
    for name in ("a", "b"):
        await world.load(name)
    return world


async def ask(world: World, parts: list[tuple[str, float]] = PARTS) -> Version:
    """One request that is over: its sum, leased as `generate` leases it."""
    async with world.registry.composed([Share(*part) for part in parts]) as (version, _):
        assert version.state is State.RESIDENT
        leased = await world.registry.lease(version.tag, exact=True)
        assert leased.tag == version.tag and leased.leases
        world.registry.release(leased)
    return version


async def refused(world: World, parts: list[tuple[str, float]]) -> LoramuxError:
    with pytest.raises(LoramuxError) as error:
        await ask(world, parts)
    return error.value


async def test_first_requests_at_once_share_one_load() -> None:
    world = await two()
    versions = await asyncio.gather(*(ask(world) for _ in range(8)))
    assert len(set(versions)) == len(world.compose.made) == 1
    assert world.data_plane.log.count(("load", versions[0].version_id)) == 1
    assert versions[0].tag == f"{COMPOSED}@{versions[0].digest}"
    assert COMPOSED not in world.registry.adapters() and world.registry.lookup(versions[0].tag) is None


async def test_order_and_spelling_make_no_difference_and_weights_do() -> None:
    world = await two()
    first = await ask(world)
    assert await ask(world, PARTS[::-1]) is first
    assert await ask(world, [(f"a@{world.current('a').digest}", 0.7), ("tiny-base:b", 0.3)]) is first
    other = await ask(world, [("a", 0.3), ("b", 0.7)])
    assert other.tag != first.tag and other.version_id != first.version_id


async def test_a_router_is_a_version_of_its_own_whatever_the_order_of_its_parts() -> None:
    world = await two()

    async def ask_for(parts: list[Share], router: Router | None) -> Held:
        async with world.registry.composed(parts, router) as held:
            assert held.version.state is State.RESIDENT
            return held

    a, b = Share("a"), Share("b")
    first, again = await ask_for([a, b], Router(2)), await ask_for([b, a], Router(2))
    assert again.version is first.version and again.order == first.order[::-1]
    others = [await ask_for([a, b], router) for router in (None, Router(1), Router(2, 0.5))]
    assert len({held.version.tag for held in (first, *others)}) == 4
    with pytest.raises(InvalidRequest, match="twice"):
        await ask_for([a, a], Router(2))


async def test_contents_order_the_parts_before_names() -> None:
    """Whoever has the same contents gets the same file, whatever they are called."""
    world = World()
    for name, content in (("a", "same"), ("b", "same"), ("c", "other")):
        await world.load(name, content)
    one = await ask(world, [("a", 0.5), ("b", 2.0), ("c", 1.0)])
    other = await ask(world, [("a", 2.0), ("b", 0.5), ("c", 1.0)])
    assert one is not other and one.tag == other.tag


async def test_parts_mean_their_current_versions() -> None:
    world = await two()
    first, old = await ask(world), world.current("a").tag
    await world.load("a", "a2", replace=True)
    second = await ask(world)
    assert second.tag != first.tag
    assert await ask(world, [(old, 0.7), ("b", 0.3)]) is first
    both = await ask(world, [(old, 0.5), ("a", 0.5)])  # two versions of one adapter are two parts
    assert both not in (first, second)


async def test_parts_need_not_be_on_the_device_and_are_waited_for() -> None:
    world = World(capacity=1000)
    given = {name: Given(Path("/adapters") / name, settle=False) for name in ("a", "b")}
    await world.registry._startup.restore(given)
    world.prepare.gates[Path("/adapters/b")] = threading.Event()
    asked = asyncio.create_task(ask(world))
    await until(lambda: world.state("b") is State.READING)
    assert not asked.done()
    world.prepare.gates[Path("/adapters/b")].set()
    version = await asked
    assert [entry for entry in world.data_plane.log if entry[0] == "load"] == [("load", version.version_id)]


async def test_it_is_evicted_like_others_and_comes_back_as_the_same() -> None:
    world = World(capacity=2000)
    for name in ("a", "b"):
        await world.load(name)
    version = await ask(world)
    async with world.registry.composed([Share(*part) for part in PARTS]) as (held, _):
        await world.registry.lease(held.tag, exact=True)
        await world.load("c")
        assert held.state is State.RESIDENT  # leased
        world.registry.release(held)
        await world.load("d")
        await world.load("e")
        assert held.state is State.HOST
        assert await world.registry.lease(held.tag, exact=True) is version
        world.registry.release(held)
    assert len(world.compose.made) == 1


async def test_only_so_many_are_kept_and_their_artefacts_go(tmp_path: Path) -> None:
    world = World(compose=FakeCompose(tmp_path))
    await world.load("a")
    async with world.registry.composed([Share("a", 0.5)]) as (held, _):
        first = await ask(world, [("a", 1.0)])
        for weight in range(2, KEPT + 3):
            await ask(world, [("a", float(weight))])
        assert len(world.registry._compositions) == len(list(tmp_path.iterdir())) == KEPT
        await until(lambda: first.state is State.GONE)
        assert held.state is State.RESIDENT and held.artefact is not None and held.artefact.path.exists()
    again = await ask(world, [("a", 1.0)])
    assert again.tag == first.tag and again.version_id != first.version_id
    with pytest.raises(AdapterNotFound):
        await world.registry.lease(f"{COMPOSED}@0000", exact=True)


async def test_of_two_with_the_same_content_a_lease_gets_the_one_that_is_there() -> None:
    """Two owners of one content, and so two sums of one tag: what is evicted is not brought back for nothing."""
    world = World(capacity=2000)
    for name in ("a", "b"):
        await world.load(name, "same")
    async with (
        world.registry.composed([Share("a", 2.0)]) as (first, _),
        world.registry.composed([Share("b", 2.0)]) as (second, _),
    ):
        assert first.tag == second.tag and first is not second
        await world.load("c")
        assert (first.state, second.state) == (State.HOST, State.RESIDENT)
        assert await world.registry.lease(first.tag, exact=True) is second
        world.registry.release(second)
        for name in ("d", "e"):
            await world.load(name)
        assert (first.state, second.state) == (State.HOST, State.HOST)
    async with world.registry.composed([Share("a", 2.0)]) as (first, _):
        await world.load("f")
        await world.load("g")
        assert (first.state, second.state) == (State.HOST, State.HOST)
        assert await world.registry.lease(first.tag, exact=True) is first  # held, and so never forgotten meanwhile
        world.registry.release(first)


async def test_a_lost_artefact_is_made_again() -> None:
    world = World(capacity=1000)
    await world.load("a")
    version = await ask(world, [("a", 2.0)])
    await world.load("b")
    assert version.state is State.HOST
    world.data_plane.errors = [AdapterRefused("The artefact is damaged.", code="adapter_unreadable")]
    assert await ask(world, [("a", 2.0)]) is version
    assert len(world.compose.made) == 2


async def test_unknown_parts_have_close_names_and_a_place() -> None:
    error = await refused(await two(), [("a", 1.0), ("bb", 1.0)])
    assert isinstance(error, AdapterNotFound) and error.param == "adapters[1].name"
    assert error.hint is not None and "'b'" in error.hint


async def test_an_adapter_given_twice_is_refused() -> None:
    world = await two()
    for other in ("a", f"a@{world.current('a').digest}", "tiny-base:a"):
        error = await refused(world, [("a", 1.0), ("b", 1.0), (other, 2.0)])
        assert isinstance(error, InvalidRequest) and error.param == "adapters[2].name"


async def test_a_part_that_failed_tells_why() -> None:
    world = await two()
    world.prepare.errors[Path("/adapters/c")] = AdapterCorrupt("Truncated.", hint="Copy it again.")
    with pytest.raises(AdapterRefused):
        await world.load("c")
    error = await refused(world, [("a", 1.0), ("c", 1.0)])
    assert (error.code, error.param, error.hint) == ("adapter_corrupt", "adapters[1].name", "Copy it again.")
    assert error.message == "The part 'c' failed: Truncated."
    stored = world.current("c").error
    assert stored is not None and stored.param is None


async def test_a_part_that_stays_loading_ends_the_patience() -> None:
    world = World(patience_s=0.02)
    await world.registry._startup.restore({"a": Given(Path("/adapters/a"), settle=False)})
    gate = world.prepare.gates[Path("/adapters/a")] = threading.Event()
    error = await refused(world, [("a", 1.0)])
    assert isinstance(error, AdapterLoading) and error.param == "adapters[0].name"
    gate.set()
    await until(lambda: world.state("a") is State.HOST)


async def test_a_sum_that_is_refused_is_told_and_tried_again() -> None:
    world = await two()
    world.compose.error = AdapterUnsupportedFeature("'a' uses gates.", hint="Alone.", field="a")
    error = await refused(world, PARTS)
    assert (error.code, error.param, error.hint) == ("adapter_unsupported_feature", "adapters", "Alone.")
    assert len(world.registry._compositions) == 0
    world.compose.error = AdapterCorrupt("/secret/path", hint="")
    error = await refused(world, PARTS)
    assert error.code == "adapter_unreadable" and "secret" not in error.message
    world.compose.error = None
    await ask(world)


async def test_who_leaves_while_it_is_made_holds_nothing() -> None:
    world = await two()
    world.compose.gate = threading.Event()
    asked = asyncio.create_task(ask(world))
    await until(lambda: world.compose.made)
    asked.cancel()
    await asyncio.wait([asked])
    world.compose.gate.set()
    version = await ask(world)
    assert len(world.compose.made) == 1 and not version.leases and not version.waiting


async def test_events_have_one_name() -> None:
    world = await two()
    world.observer.events.clear()
    for weight in (1.0, 2.0, 3.0):
        await ask(world, [("a", weight)])
    assert {name for _, name, _ in world.observer.events} == {COMPOSED}


async def test_a_task_of_an_adapter_is_a_part_of_its_own() -> None:
    world = await two()
    current = world.current("a")
    assert current.artefact is not None
    current.artefact = replace(current.artefact, summary=replace(current.artefact.summary, tasks=3))

    async def ask_for(*parts: Share) -> Version:
        async with world.registry.composed(parts) as (version, _):
            return version

    versions = [await ask_for(Share("a", 1.0, task)) for task in (None, 0, 1, 2)]
    assert len(set(versions)) == 4 and await ask_for(Share("a", 1.0, 1)) is versions[2]
    assert await ask_for(Share("a", 0.5, 0), Share("a", 0.5, 1)) is await ask_for(
        Share("a", 0.5, 1), Share("a", 0.5, 0)
    )
    for parts, hint in (
        ([Share("b"), Share("a", 1.0, 3)], "0 to 2"),
        ([Share("b"), Share("a", 1.0, -1)], "0 to 2"),
        ([Share("a"), Share("b", 1.0, 0)], "has none"),
    ):
        with pytest.raises(InvalidRequest, match="no task") as error:
            await ask_for(*parts)
        assert error.value.param == "adapters[1].task" and hint in str(error.value.hint)
    with pytest.raises(InvalidRequest, match="twice"):
        await ask_for(Share("a", 1.0, 1), Share("a", 2.0, 1))
