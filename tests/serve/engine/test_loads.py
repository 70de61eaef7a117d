"""Several loads, loads that are given up, and stagers that die: nothing is lost, nothing stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.engine.loads import Arrived, Loads
from loramux.staging import Setup, Staging
from loramux.staging.buffer import StagingBuffer
from loramux_adapters.artefact import digest_of, write_artefact
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_kernels import AdapterPool, SiteSpec
from loramux_kernels.sites import lookup

from ..stagers import launch_thread

SPEC = SiteSpec("o_proj", ("o_proj",), 24, (16,))
LINE = 128


@pytest.fixture
def pool() -> AdapterPool:
    return AdapterPool(
        [SPEC],
        capacity_bytes=64 * LINE,
        slots=4,
        max_rank=64,
        max_tokens=8,
        max_requests=8,
        dtype=torch.float32,
        device="cpu",
    )


@pytest.fixture
def make(pool: AdapterPool) -> Iterator[Callable[..., Loads]]:
    made: list[Loads] = []

    def loads(launch: Any = launch_thread, pieces: int = 2) -> Loads:
        made.append(Loads(pool, Staging(Setup(pool.geometry, {}, LINE, pieces), launch=launch)))
        return made[-1]

    yield loads
    for each in made:
        each.close()


@pytest.fixture
def artefact(tmp_path: Path) -> Callable[..., str]:
    def write(value: float, rank: int = 8) -> str:
        site = LoweredSite(torch.full((rank, 24), value), torch.ones(rank, 16), torch.ones(rank))
        adapter = LoweredAdapter("lora", {"o_proj": site})
        return str(write_artefact(adapter, "base", digest_of(adapter), tmp_path))

    return write


def held(pool: AdapterPool, slot: int) -> float:
    """The one value of A in a slot."""
    weights = lookup(pool.site_ids[0]).slots[slot]
    assert weights is not None
    (value,) = weights.a.unique().tolist()
    return float(value)


def until(loads: Loads, version: int, *, give_up: Callable[[], bool] = lambda: False) -> Any:
    """Advance until the load has ended or `give_up`; its last answer."""
    deadline = time.monotonic() + 20
    while True:
        assert time.monotonic() < deadline
        answer = loads.advance(version)
        if answer not in ("reading", "copying") or give_up():
            return answer
        if answer == "reading":
            time.sleep(0.001)


def test_loads_take_turns_and_none_waits_for_one_that_nobody_asks_for(
    make: Callable[..., Loads], pool: AdapterPool, artefact: Callable[..., str]
) -> None:
    loads = make()
    for version in (1, 2, 3):
        loads.begin(version, artefact(version))
    for version in (3, 1, 2):
        arrived = until(loads, version)
        assert isinstance(arrived, Arrived) and held(pool, arrived.slot) == version
        assert loads.advance(version) == {"code": "internal_error", "message": "this load was not begun or has ended"}
    assert pool.used_bytes == 3 * arrived.nbytes


@pytest.mark.parametrize("version", [1, 2])
def test_a_load_that_is_given_up_leaves_its_pieces_to_the_next(
    make: Callable[..., Loads], pool: AdapterPool, artefact: Callable[..., str], version: int
) -> None:
    """At any point, though there is only one piece, and whether or not the next is the same version."""
    path, other = artefact(1), artefact(2)
    loads = make(pieces=1)
    for turns in range(12):
        loads.begin(1, path)
        for _ in range(turns):
            loads.advance(1)
        if version != 1:
            loads.abandon(1)
        loads.begin(version, other)
        arrived = until(loads, version)
        assert isinstance(arrived, Arrived) and held(pool, arrived.slot) == 2
        pool.release(arrived.slot)
        assert (pool.used_bytes, pool.free_slots) == (0, 4)


def test_what_has_arrived_and_was_not_told_is_given_up_as_well(
    make: Callable[..., Loads], pool: AdapterPool, artefact: Callable[..., str]
) -> None:
    loads = make()
    loads.begin(1, artefact(1))
    loads.begin(2, artefact(2))
    until(loads, 2)
    loads.abandon(1)
    assert pool.resident() == (1,)


def test_a_load_for_which_there_is_no_room_makes_way(
    make: Callable[..., Loads], pool: AdapterPool, artefact: Callable[..., str]
) -> None:
    loads = make(pieces=1)
    loads.begin(1, artefact(1, rank=64))
    loads.begin(2, artefact(2))
    assert until(loads, 1)["code"] == "adapter_memory_full"
    assert isinstance(until(loads, 2), Arrived)


class SlowCopies:
    """A device whose copies end when the test says so."""

    def __init__(self) -> None:
        self.under_way: list[int] = []
        self.done: list[int] = []
        self.steps_waited_for = 0

    def wait_for_steps(self) -> None:
        self.steps_waited_for += 1

    @contextmanager
    def issue(self, piece: int) -> Iterator[None]:
        assert self.steps_waited_for
        yield
        self.under_way.append(piece)

    def ended(self) -> list[int]:
        done, self.done = self.done, []
        return done

    @property
    def busy(self) -> bool:
        return bool(self.under_way)


def test_a_version_is_published_when_its_copies_have_run_and_a_piece_is_free_then(
    make: Callable[..., Loads], pool: AdapterPool, artefact: Callable[..., str]
) -> None:
    loads, copies = make(pieces=2), SlowCopies()
    loads._copies = copies  # type: ignore[assignment]
    loads.begin(1, artefact(1))
    arrived = None
    while arrived is None:
        until(loads, 1, give_up=lambda: len(copies.under_way) == 2 or loads._loads[1].staged)
        assert len(set(copies.under_way)) == len(copies.under_way) <= 2
        for _ in range(3):  # nothing more can be read, and nothing is published
            assert loads.advance(1) == "reading" and not pool.resident()
        copies.done, copies.under_way = copies.under_way, []
        if loads._loads[1].staged:
            arrived = until(loads, 1)
    assert isinstance(arrived, Arrived) and held(pool, arrived.slot) == 1


class Mortal:
    """Stagers of which the first ones die, after so many messages that they send."""

    def __init__(self, *lives: int) -> None:
        self.lives = list(lives)
        self.started = 0

    def __call__(self, theirs: Connection, buffer: StagingBuffer, setup: Setup) -> Callable[[], object]:
        self.started += 1
        if not self.lives:
            return launch_thread(theirs, buffer, setup)
        return launch_thread(theirs, buffer, setup, messages=self.lives.pop(0))


@pytest.mark.parametrize("messages", [0, 1, 2, 5])
def test_a_stager_that_dies_is_replaced_and_the_load_begun_again(
    make: Callable[..., Loads], pool: AdapterPool, artefact: Callable[..., str], messages: int
) -> None:
    stagers = Mortal(messages)
    loads = make(stagers)
    for version in (1, 2):
        loads.begin(version, artefact(version))
    for version in (1, 2):
        arrived = until(loads, version)
        assert isinstance(arrived, Arrived) and held(pool, arrived.slot) == version
    assert stagers.started == 2 and pool.used_bytes == 2 * arrived.nbytes


def test_an_artefact_of_which_two_stagers_die_is_unreadable_and_the_next_is_loaded(
    make: Callable[..., Loads], pool: AdapterPool, artefact: Callable[..., str]
) -> None:
    stagers = Mortal(2, 3)
    loads = make(stagers)
    loads.begin(1, artefact(1))
    assert until(loads, 1)["code"] == "adapter_unreadable"
    assert pool.used_bytes == 0
    loads.begin(2, artefact(2))
    arrived = until(loads, 2)
    assert isinstance(arrived, Arrived) and held(pool, arrived.slot) == 2
    assert stagers.started == 3


def test_no_new_stager_fails_the_load_and_is_tried_again_for_the_next(
    make: Callable[..., Loads], pool: AdapterPool, artefact: Callable[..., str]
) -> None:
    stagers, refusals = Mortal(1), [OSError(12, "Cannot allocate memory")]

    def launch(*args: Any) -> Callable[[], object]:
        if stagers.started and refusals:
            raise refusals.pop()
        return stagers(*args)

    loads = make(launch)
    loads.begin(1, artefact(1))
    error = until(loads, 1)
    assert error == {"code": "internal_error", "message": "The adapter could not be read: Cannot allocate memory."}
    loads.begin(2, artefact(2))
    assert isinstance(until(loads, 2), Arrived)
