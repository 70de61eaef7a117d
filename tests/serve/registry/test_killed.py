"""kill -9 while names change: what was told is on disk, and the next server has the same adapters.

A process changes names as fast as it can and tells each change over a pipe, before and after. It is killed at a random
instant; the state file must then say what was told last, or also the one change that was under way. Fifty times over
the same file, so that every life begins with what the one before left.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

from loramux.registry import Store, Version
from loramux.registry.store import SavedCalibration

from ..fakes import BASE, FakePrepare, World

KILLS = 50
NAMES = ("a", "b", "c")
CONTENTS = tuple("qrstuv")
LONGEST_LIFE_S = 0.15

#: Digests of the current and previous version, pinned, and the calibrations of the current one.
Meaning = tuple[str | None, str | None, bool, tuple[str, ...]]
Told = dict[str, Meaning]


def _calibrations(store: Store, name: str, digest: str | None) -> tuple[str, ...]:
    return tuple(row.id for row in store.calibrations(name) if row.digest == digest)


def _meanings(world: World) -> Told:
    def digest(version: Version | None) -> str | None:
        return version.artefact.digest if version and version.artefact else None

    return {
        name: (
            digest(adapter.current),
            digest(adapter.previous),
            adapter.pinned,
            _calibrations(world.store, name, digest(adapter.current)),
        )
        for name, adapter in world.registry.adapters().items()
    }


def _on_disk(state: Path, cache: Path) -> Told:
    store = Store.open(state, base=BASE, cache=cache)
    try:
        return {
            row.name: (row.digest, row.previous_digest, row.pinned, _calibrations(store, row.name, row.digest))
            for row in store.adapters()
        }
    finally:
        store.close()


async def _change(world: World, choice: random.Random, pipe: Connection) -> None:
    name, registry = choice.choice(NAMES), world.registry
    known = registry.adapters().get(name)
    kinds = (
        ["put"]
        if known is None
        else ["put", "put", "delete", "pin", "calibrate", *(["rollback"] if known.previous else [])]
    )
    kind, source = choice.choice(kinds), Path("/adapters") / choice.choice(CONTENTS)
    pipe.send((name, None))
    match kind:
        case "put":
            await (await registry.put(name, source))
        case "delete":
            await registry.delete(name)
        case "pin":
            await registry.pin(name, choice.random() < 0.5)
        case "rollback":
            await registry.rollback(name)
        case "calibrate":
            assert known is not None and known.current.artefact is not None
            digest = known.current.artefact.digest
            new = SavedCalibration(f"cal-{choice.random()}", name, digest, "{}")
            world.store.keep_calibration(new, [row for row in world.store.calibrations(name) if row.digest == digest])
    pipe.send((None, _meanings(world)))


def _live(state: Path, cache: Path, seed: int, pipe: Connection) -> None:
    async def change_for_ever() -> None:
        # Room for two of three: rollbacks and pins meet evictions too.
        store = Store.open(state, base=BASE, cache=cache)
        world = World(capacity=2500, prepare=FakePrepare(cache), store=store)
        await world.registry.start({})
        while world.registry._tasks._running:
            await asyncio.sleep(0.001)  # changes that the last life began, and reads it did not get to
        pipe.send((None, _meanings(world)))
        choice = random.Random(seed)
        while True:
            try:
                await _change(world, choice, pipe)
            except Exception as error:  # a full pool, say: nothing has changed
                assert type(error).__module__ == "loramux.errors", error
                pipe.send((None, _meanings(world)))

    asyncio.run(change_for_ever())


def test_fifty_kills(tmp_path: Path) -> None:
    state, cache = tmp_path / "state.sqlite", tmp_path / "artefacts"
    cache.mkdir()
    # Forked: a process of its own would spend seconds on imports for each life of a tenth.
    context = multiprocessing.get_context("fork")
    choice, changes, interrupted = random.Random(0), 0, 0
    for life in range(KILLS):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_live, args=(state, cache, life, theirs))
        process.start()
        theirs.close()
        assert ours.poll(20), "it never began"
        time.sleep(choice.uniform(0, LONGEST_LIFE_S))
        process.kill()
        process.join()
        told: Told = {}
        under_way: str | None = None
        try:
            while True:
                name, meanings = ours.recv()
                changes += meanings is not None
                under_way, told = name, told if meanings is None else meanings
        except EOFError:
            pass
        found = _on_disk(state, cache)
        interrupted += under_way is not None
        for name in NAMES:
            if name != under_way:
                assert found.get(name) == told.get(name), f"life {life}: {name} was told to be {told.get(name)}"
        # Of the one under way: as it was, or changed, never half.
        now, before = found.get(under_way or ""), told.get(under_way or "")
        if now is not None and now != before:
            assert now[0] is None or (cache / f"{now[0]}.safetensors").exists()
            assert before is None or now[:2] in (before[:2], before[1::-1]) or now[1] == before[0]
    assert changes > 5 * KILLS and interrupted > KILLS / 4, "the kills came at no interesting instant"
    asyncio.run(_all_answer(state, cache))


async def _all_answer(state: Path, cache: Path) -> None:
    """A last life: every name can be used, and means what the file says."""
    expected = _on_disk(state, cache)
    world = World(prepare=FakePrepare(cache), store=Store.open(state, base=BASE, cache=cache))
    await world.registry.start({})
    for name, (digest, *_) in expected.items():
        version = await world.hold(name)
        assert version.artefact is not None and digest in (None, version.artefact.digest)
        world.registry.release(version)
