"""What a model name in a request means."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from loramux.errors import AdapterNameTaken, AdapterNotFound, AdapterRefused
from loramux_adapters import AdapterCorrupt

from ..fakes import BASE, World, until


async def swapped() -> World:
    """`a` with a current and a previous version, and `b`."""
    world = World()
    await world.load("a", "one")
    await world.load("a", "two", replace=True)
    await world.load("b")
    return world


async def test_every_spelling_of_a_name() -> None:
    world = await swapped()
    adapter = world.registry.adapter("a")
    assert adapter.previous is not None
    current, previous = adapter.current, adapter.previous
    assert current.digest and previous.digest
    for digits, version in ((current.digest, current), (previous.digest, previous)):
        for spelling in (f"a@{digits}", f"a@{digits[:4]}", f"a@{digits.upper()}", f"{BASE}:a@{digits}"):
            assert await world.registry.resolve(spelling) is version
    for spelling in ("a", f"{BASE}:a"):
        assert await world.registry.resolve(spelling) is current
        assert world.registry.lookup(spelling) is current


@pytest.mark.parametrize(
    "spelling", ["c", "a@", "a@0000", "a@6f6", f"{BASE}:", f"{BASE}:c", f"{BASE}:{BASE}:a", "@", ""]
)
async def test_what_means_nothing_is_not_found(spelling: str) -> None:
    world = await swapped()
    assert world.registry.lookup(spelling) is None
    with pytest.raises(AdapterNotFound) as caught:
        await world.registry.resolve(spelling)
    assert caught.value.hint


async def test_digits_of_both_versions_name_neither() -> None:
    world = World()
    await world.load("a", "same-1")
    await world.load("a", "same-2", replace=True)  # the fakes' digests begin with the content's first letters
    digest = world.current("a").digest
    assert digest is not None
    with pytest.raises(AdapterNotFound):
        await world.registry.resolve(f"a@{digest[:8]}")
    assert await world.registry.resolve(f"a@{digest}") is world.current("a")


async def test_a_version_that_is_not_read_yet_is_waited_for() -> None:
    world = World()
    source = Path("/adapters/a")
    digest = (await World().load("x", "a")).digest
    world.prepare.gates[source] = threading.Event()
    put = await world.registry.put("a", source)
    asked = asyncio.create_task(world.registry.resolve(f"a@{digest}"))
    other = asyncio.create_task(world.registry.resolve("a@ffffffff"))
    await until(lambda: world.prepare.read)
    assert not asked.done()
    world.prepare.gates[source].set()
    assert await asked is (await put).current
    with pytest.raises(AdapterNotFound):
        await other


async def test_a_failed_adapter_has_no_versions() -> None:
    world = World()
    world.prepare.errors[Path("/adapters/a")] = AdapterCorrupt("Broken.", hint="Copy it again.")
    with pytest.raises(AdapterRefused):
        await world.load("a")
    with pytest.raises(AdapterNotFound):
        await world.registry.resolve("a@1234")
    with pytest.raises(AdapterRefused):
        await world.registry.resolve("a")


@pytest.mark.parametrize("name", [BASE, f"{BASE}:a"])
async def test_no_adapter_takes_the_names_of_the_base(name: str) -> None:
    """`base:a` would be another tenant's adapter in the eyes of whoever checks allow-lists."""
    world = World()
    with pytest.raises(AdapterNameTaken):
        await world.load(name, "a")
    assert world.prepare.read == []


@pytest.mark.parametrize("call", ["resolve", "delete", "rollback", "pin", "adapter"])
async def test_an_unknown_name_proposes_close_ones(call: str) -> None:
    world = World()
    for name in ("support-bot", "sql-writer"):
        await world.load(name)
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
            await world.registry.delete(f"guess-{i}")
    assert len(world.registry._changes.turns) == 0


def test_an_endless_name_costs_a_short_answer() -> None:
    assert len(World().registry.not_found("x" * 10**6).message) < 300
