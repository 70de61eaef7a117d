"""Draws of Bayesian adapters as versions: the same for all, leased together, evicted, forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loramux.errors import AdapterRefused, DrawsDoNotFit, InvalidRequest, LoramuxError, PoolExhausted
from loramux.registry import State, Version
from loramux.registry.draws import DRAWN, KEPT, SAMPLES
from loramux_adapters import AdapterCorrupt, AdapterNotFinite

from ..fakes import FakePosteriors, World, quiet

SIZE = 1000  # of an adapter, and so of its draws


async def drawn(world: World, name: str = "a", samples: int = 4, seed: int = 0) -> list[Version]:
    """One request that reads its draws and is over."""
    mean = await world.hold(name)
    try:
        async with world.registry.drawn(mean, seed=seed, samples=samples) as versions:
            for version in versions:
                assert version.state is State.RESIDENT and version.leases
                leased = await world.registry.lease(version.tag, exact=True)  # as the engine's wrapper does
                assert leased.tag == version.tag
                world.registry.release(leased)
    finally:
        world.registry.release(mean)
    return list(versions)


def idle(versions: Sequence[Version]) -> bool:
    return not any(version.leases or version.waiting or version.busy for version in versions)


async def test_requests_share_the_draws_of_a_version() -> None:
    world = World()
    await world.load("a")
    sets = await asyncio.gather(*(drawn(world, samples=samples) for samples in (4, 2, 8)))
    assert sets[0] == sets[2][:4] and sets[1] == sets[2][:2]
    digest = world.current("a").artefact.digest  # type: ignore[union-attr]
    assert sorted(world.posteriors.made) == [(digest, 0, sample) for sample in range(8)]
    assert len({version.tag for version in sets[2]}) == 8 and idle(sets[2])
    assert all(version.tag.startswith(f"{DRAWN}@") for version in sets[2])
    assert DRAWN not in world.registry.adapters() and world.registry.lookup(sets[2][0].tag) is None


async def test_another_seed_and_another_version_are_other_draws() -> None:
    world = World()
    await world.load("a")
    first = await drawn(world)
    assert not set(first) & set(await drawn(world, seed=1))
    await world.load("a", "a2", replace=True)
    assert not {version.tag for version in first} & {version.tag for version in await drawn(world)}
    await world.load("b", "a")  # the content of the first version under another name
    assert await drawn(world, "b") == first


async def test_draws_are_evicted_and_come_back_as_they_were() -> None:
    world = World(capacity=5 * SIZE)
    await world.load("a")
    versions = await drawn(world)
    ids = [version.version_id for version in versions]
    for name in ("b", "c", "d"):
        await world.load(name)
    assert sum(version.state is State.RESIDENT for version in versions) == 1
    await world.load("a", replace=True)
    assert [version.version_id for version in await drawn(world)] == ids


async def test_two_adapters_draws_take_turns_where_both_do_not_fit() -> None:
    world = World(capacity=6 * SIZE)
    for name in ("a", "b"):
        await world.load(name)
    a, b = await asyncio.gather(drawn(world, "a"), drawn(world, "b"))
    assert idle([*a, *b]) and not set(a) & set(b)


async def test_equal_draws_are_found_where_they_are() -> None:
    world = World()
    world.posteriors.same = True
    await world.load("a")
    versions = await drawn(world)
    assert len({version.tag for version in versions}) == 1 and len(set(versions)) == 4


async def test_how_many_draws_a_request_gets() -> None:
    world = World(capacity=100 * SIZE)
    mean = await world.load("a")
    assert [await world.registry.samples(mean, asked) for asked in (None, 2, 64)] == [SAMPLES, 2, 64]
    world.posteriors.samples = 5  # an ensemble
    other = await world.load("b")
    assert [await world.registry.samples(other, asked) for asked in (None, 5)] == [5, 5]
    with pytest.raises(InvalidRequest) as error:
        await world.registry.samples(other, 6)
    assert error.value.param == "uncertainty.samples" and "5 or fewer" in (error.value.hint or "")
    assert len(world.posteriors.described) == 2  # each posterior is read once


async def test_what_can_never_fit_is_said_with_what_would() -> None:
    world = World(capacity=6 * SIZE)
    mean = await world.load("a")
    assert await world.registry.samples(mean, 5) == 5
    with pytest.raises(DrawsDoNotFit) as error:
        await world.registry.samples(mean, 6)
    assert '"samples": 5 or fewer' in (error.value.hint or "")
    world = World(capacity=2 * SIZE)
    with pytest.raises(DrawsDoNotFit) as error:
        await world.registry.samples(await world.load("a"), 2)
    assert "samples" not in (error.value.hint or "")


async def test_draws_larger_than_their_mean() -> None:
    world = World(capacity=9 * SIZE)
    world.posteriors.growth = 2
    mean = await world.load("a")
    assert await world.registry.samples(mean, 4) == 4
    with pytest.raises(DrawsDoNotFit):
        await world.registry.samples(mean, 5)
    world.posteriors.rank = 17
    with pytest.raises(DrawsDoNotFit) as error:
        await world.registry.samples(await world.load("b"), 2)
    assert "--max-lora-rank 17" in (error.value.hint or "")


def sharing(share: float = 0.5, **options: Any) -> World:
    world = World(**options)
    world.data_plane.shared = world.posteriors.shared = share
    return world


async def test_draws_that_share_with_their_mean_take_what_is_their_own() -> None:
    world = sharing(capacity=5 * SIZE)
    mean = await world.load("a")
    assert await world.registry.samples(mean, 8) == 8
    with pytest.raises(DrawsDoNotFit) as error:
        await world.registry.samples(mean, 9)
    assert '"samples": 8 or fewer' in (error.value.hint or "")
    versions = await drawn(world, samples=8)
    assert {version.resident_bytes for version in versions} == {SIZE // 2}
    assert world.registry.resident_bytes() == 5 * SIZE == sum(world.data_plane.resident.values())
    assert set(world.data_plane.lent.values()) == {mean.version_id}


async def test_who_lends_is_evicted_after_its_draws() -> None:
    world = sharing(capacity=3 * SIZE)
    mean = await world.load("a")
    versions = await drawn(world)
    await world.registry.resolve("a")
    for name, left in (("b", 2), ("c", 0)):
        await world.load(name)
        assert sum(version.state is State.RESIDENT for version in versions) == left
        assert mean.state is State.RESIDENT
    await world.load("d")
    assert mean.state is State.HOST and world.state("b") is State.RESIDENT
    # As before the eviction, but for the mean: who asks for draws brings it first.
    assert await drawn(world) == versions
    assert set(world.data_plane.lent.values()) == {mean.version_id}


async def test_draws_go_for_their_mean_and_never_the_mean_alone() -> None:
    world = sharing(capacity=3 * SIZE)
    mean = await world.load("a")
    await drawn(world)
    world.prepare.sizes["big"] = 3 * SIZE
    await world.load("big")
    assert mean.state is State.HOST and len(world.data_plane.resident) == 1
    evicted = [name for kind, name, _ in world.observer.events if kind == "evicted"]
    assert evicted == [DRAWN] * 4 + ["a"]


@pytest.mark.parametrize("how", ["delete", "replace"])
async def test_idle_draws_leave_with_their_mean(how: str) -> None:
    world = sharing()
    mean = await world.load("a")
    versions = await drawn(world)
    if how == "delete":
        await world.registry.delete("a")
        assert not world.data_plane.resident  # when it has returned
    else:
        await world.load("a", "a2", replace=True)
        await quiet()
        assert list(world.data_plane.resident) == [world.current("a").version_id]
    assert mean.state is (State.GONE if how == "delete" else State.HOST)
    assert {version.state for version in versions} == {State.HOST}


@pytest.mark.parametrize("order", [0, 1])
async def test_draws_in_use_keep_the_memory_of_a_mean_that_is_deleted(order: int) -> None:
    world = sharing()
    mean = await world.load("a")
    held = await world.hold("a")
    async with world.registry.drawn(mean, seed=0, samples=2) as versions:
        await world.registry.delete("a")
        assert mean.state is State.DRAINING
        if order:
            world.registry.release(held)
            await quiet()
            assert mean.version_id in world.data_plane.resident
    if not order:
        world.registry.release(held)
    await quiet()
    assert not world.data_plane.resident and mean.state is State.GONE
    assert idle(versions) and world.registry.resident_bytes() == 0


async def test_an_equal_adapter_lends_when_the_first_has_left() -> None:
    world = sharing()
    for name in ("a", "b"):
        await world.load(name, "same")
    first = await drawn(world, "a")
    assert await drawn(world, "b") == first
    lenders = world.data_plane.lent.copy()
    assert set(lenders.values()) == {world.current("a").version_id}
    mean = await world.hold("b")
    async with world.registry.drawn(mean, seed=0, samples=4):
        await world.registry.delete("a")
        assert len(world.data_plane.resident) == 6  # they are read, with memory of the one that is deleted
        again = await drawn(world, "b")  # others may still use them
    world.registry.release(mean)
    await quiet()
    assert again == first and list(world.data_plane.resident) == [world.current("b").version_id]
    await drawn(world, "b")
    assert set(world.data_plane.lent.values()) == {world.current("b").version_id}


async def test_a_draw_that_needed_less_beside_its_mean_may_need_more_without() -> None:
    world = sharing(capacity=2 * SIZE)
    mean = await world.load("a")
    (version,) = await drawn(world, samples=1)
    assert version.needed_bytes == SIZE // 2
    await world.load("b", "big")
    await world.registry.delete("a")
    with world.registry._residency.wanted(version):
        assert await world.registry._residency.settle(version) is None
    assert version.resident_bytes == SIZE and mean.state is State.GONE
    # And the other way round: what it needed whole does not count beside another mean.
    world.registry._residency.drain(version)
    await quiet()
    world.prepare.sizes["half"] = SIZE // 2
    await world.load("half")
    await world.registry.pin("half")
    await world.registry.delete("b")
    await world.load("c", "a")
    await world.registry.pin("c")
    assert await drawn(world, "c", samples=1) == [version]
    assert version.resident_bytes == SIZE // 2


async def test_a_posterior_that_cannot_be_read() -> None:
    world = World()
    mean = await world.load("a")
    world.posteriors.error = AdapterCorrupt("It is damaged.", hint="")
    with pytest.raises(LoramuxError):
        await world.registry.samples(mean, 2)
    world.posteriors.error = None
    assert await world.registry.samples(mean, 2) == 2


async def test_room_that_others_pin_is_missing() -> None:
    world = World(capacity=4 * SIZE, patience_s=0.2)
    await world.load("a")
    await world.load("b")
    await world.registry.pin("b")
    with pytest.raises(PoolExhausted):
        await drawn(world, samples=3)
    await world.registry.pin("b", False)
    assert idle(await drawn(world, samples=3))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterNotFinite("It is too large.", hint="", field="q.A"), "adapter_not_finite"),
        (AdapterCorrupt("It is damaged.", hint=""), "adapter_unreadable"),
        (OSError("disk full"), None),
    ],
)
async def test_a_draw_that_cannot_be_made_is_an_error_and_is_tried_again(error: Exception, code: str | None) -> None:
    world = World()
    await world.load("a")
    world.posteriors.error = error
    with pytest.raises(LoramuxError) as raised:
        await drawn(world)
    if code is not None:
        assert isinstance(raised.value, AdapterRefused) and raised.value.code == code
    await quiet()  # draws that were on their way fail too, and who asked now would share that
    world.posteriors.error = None
    assert idle(await drawn(world))


async def test_who_leaves_while_draws_load_holds_nothing() -> None:
    world = World()
    await world.load("a")
    world.data_plane.gate.clear()
    task = asyncio.create_task(drawn(world))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    world.data_plane.gate.set()
    assert idle(await drawn(world)) and idle([world.current("a")])


async def test_few_are_kept(tmp_path: Path) -> None:
    world = World(posteriors=FakePosteriors(tmp_path), capacity=10**9)
    await world.load("a")
    for seed in range(KEPT // 8 + 2):
        await drawn(world, samples=8, seed=seed)
    assert len(world.registry._draws) == KEPT
    assert len(list(tmp_path.iterdir())) == KEPT
