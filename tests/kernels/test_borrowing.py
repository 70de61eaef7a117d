"""Slots that borrow B: the same results by bits as slots that hold it, and every byte accounted for, in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loramux_kernels as lk
from loramux_kernels import AdapterPool, SiteSpec, TokenGate
from loramux_kernels.sites import TABLE_HEAD, TABLE_PART
from loramux_kernels.testing import Weights, adapter_of, load

from .applied import apply, same_bits

SPECS = (
    SiteSpec("l0.qkv", ("q", "k", "v"), 24, (32, 8, 16)),
    SiteSpec("l0.o", ("o",), 32, (24,)),
    SiteSpec("l1.o", ("p",), 32, (24,)),
)
# Ranks, gates, mags and biases.
KINDS: tuple[tuple[Mapping[str, int], Mapping[str, TokenGate], str, str], ...] = (
    ({"q": 4, "k": 4, "v": 4, "o": 4, "p": 4}, {}, "", ""),
    (
        {"q": 6, "v": 3, "o": 8},
        {"q": TokenGate(3, "top_k", k=2), "o": TokenGate(2, "threshold", threshold=0.4)},
        "k",
        "q",
    ),
    ({"k": 5, "p": 7}, {"p": TokenGate(2, "top_k", k=1, capacity=4, layer_norm_eps=1e-5)}, "p", "kp"),
)
X = [torch.randn(7, spec.d_in, generator=torch.Generator().manual_seed(i)) for i, spec in enumerate(SPECS)]
B_AT = 2  # its column of a slice
LENGTHS = np.array([7], np.int32)


def make(capacity_bytes: int, backend: str = "cpu", slots: int = 8) -> AdapterPool:
    return AdapterPool(
        SPECS,
        capacity_bytes=capacity_bytes,
        slots=slots,
        max_rank=12,
        max_tokens=8,
        max_requests=2,
        dtype=torch.float32,
        device="cpu",
        backend=backend,
    )


def results(pool: AdapterPool, slot: int) -> list[torch.Tensor]:
    counts = lk.CountRows(np.array([-1], np.int32), np.array([0], np.int32))
    pool.set_batch(np.array([slot], np.int32), LENGTHS, counts)
    return [
        apply(pool, i, x, torch.ones(7, sum(spec.d_outs))) for i, (x, spec) in enumerate(zip(X, SPECS, strict=True))
    ]


def adapter(kind: int, generator: torch.Generator) -> dict[str, Weights]:
    return adapter_of(SPECS, *KINDS[kind], torch.float32, generator)


def draw(of: Mapping[str, Weights], kind: int, generator: torch.Generator) -> dict[str, Weights]:
    """All is new but B."""
    return {m: w._replace(b=of[m].b) for m, w in adapter(kind, generator).items()}


def site_bytes(pool: AdapterPool, held: Mapping[str, Weights], borrowed: frozenset[str]) -> dict[int, int]:
    gates = {m: w.gate for m, w in held.items() if w.gate is not None}
    mag, bias = ([m for m, w in held.items() if getattr(w, name) is not None] for name in ("mag", "bias"))
    ranks = {m: len(w.a) for m, w in held.items()}
    layouts = pool.geometry.layouts(ranks, gates, mag=mag, bias=bias, borrowed=borrowed)
    return {i: layout.nbytes for i, layout in layouts.items()}


@dataclass
class Held:
    kind: int
    weights: dict[str, Weights]
    slot: int
    bytes: dict[int, int]
    wanted: list[torch.Tensor]
    borrowed: frozenset[str] = frozenset()
    lender: Held | None = None
    borrowers: dict[int, int] = field(default_factory=dict)  # site -> how many read there
    released: bool = False

    @property
    def used(self) -> int:
        return sum(n for i, n in self.bytes.items() if not self.released or self.borrowers.get(i))


def poison(pool: AdapterPool) -> None:
    """What nobody holds becomes NaN."""
    for offset, size in zip(pool._extents._offsets, pool._extents._sizes, strict=True):
        pool._arena[offset : offset + size] = 255


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("load"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("borrow"), st.integers(0, 30), st.integers(1, 31)),
        st.tuples(st.just("release"), st.integers(0, 30), st.just(0)),
    ),
    max_size=25,
)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(max_examples=40, deadline=None)
@given(STEPS, st.integers(0, 2**32 - 1))
def test_any_order_of_loads_borrowers_and_releases(backend: str, steps: list[tuple[str, int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pool, alone = make(40 << 10, backend), make(40 << 10, backend)
    everything: list[Held] = []

    def take(kind: int, weights: dict[str, Weights], lender: Held | None = None, which: int = 0) -> None:
        borrowable = [m for m in weights if len(weights[m].a)] if lender is not None else []
        borrowed = frozenset(m for bit, m in enumerate(borrowable) if which >> bit & 1)
        sizes = site_bytes(pool, weights, borrowed)
        before = pool.used_bytes, pool.free_slots, pool.resident()
        try:
            slot = load(pool, weights, borrowed, lender.slot if lender else None)
        except (lk.PoolFull, ValueError) as refused:
            assert isinstance(refused, lk.PoolFull) or (lender is not None and borrowed & lender.borrowed)
            assert (pool.used_bytes, pool.free_slots, pool.resident()) == before
            return
        assert lender is None or not borrowed & lender.borrowed
        whole = load(alone, weights)
        everything.append(Held(kind, weights, slot, sizes, results(alone, whole), borrowed, lender))
        alone.release(whole)
        if lender is not None:
            for i in {pool.geometry.find(m)[0] for m in borrowed}:
                lender.borrowers[i] = lender.borrowers.get(i, 0) + 1

    for step, number, which in steps:
        there = [held for held in everything if not held.released]
        if step == "load":
            take(number, adapter(number, generator))
        elif there and step == "borrow":
            lender = there[number % len(there)]
            take(lender.kind, draw(lender.weights, lender.kind, generator), lender, which)
        elif there:
            leaving = there[number % len(there)]
            pool.release(leaving.slot)
            leaving.released = True
            if leaving.lender is not None:
                for i in {pool.geometry.find(m)[0] for m in leaving.borrowed}:
                    leaving.lender.borrowers[i] -= 1
        poison(pool)
        assert pool.used_bytes == sum(held.used for held in everything)
        for held in everything:
            if not held.released:
                assert all(map(same_bits, results(pool, held.slot), held.wanted))
    for held in everything:
        if not held.released:
            pool.release(held.slot)
    assert (pool.used_bytes, pool.free_slots) == (0, pool.slots)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_draw_takes_what_its_mean_takes_less_b() -> None:
    pool = make(64 << 10)
    ranks = {"q": 4, "k": 4, "v": 4, "o": 4}
    b = 4 * 4 * (32 + 8 + 16 + 24)  # whole lines
    assert pool.bytes_for(ranks, borrowed="qkvo") == pool.bytes_for(ranks) - b
    assert pool.bytes_for(ranks, mag="k", bias="o", borrowed="ko") == pool.bytes_for(ranks, mag="k", bias="o") - 16 * 32


def test_the_device_is_told_where_the_lenders_b_is(generator: torch.Generator) -> None:
    """What the kernels of a GPU read, who have nothing but the table."""
    pool = make(64 << 10, slots=2)
    mean = adapter(0, generator)
    slots = [lender := load(pool, mean), load(pool, draw(mean, 0, generator), "kvo", lender)]
    mean_row, row = (pool._sites[0].table[slot].tolist() for slot in slots)
    assert all(at != other for at, other in zip(row[:2], mean_row[:2], strict=True))  # A and scale
    places = [TABLE_HEAD + TABLE_PART * j + B_AT for j in range(3)]
    assert [row[at] == mean_row[at] for at in places] == [False, True, True]  # q has its own


def test_what_cannot_be_borrowed_changes_nothing(generator: torch.Generator) -> None:
    pool = make(64 << 10)
    mean = adapter(0, generator)
    lender = load(pool, mean)
    borrower = load(pool, draw(mean, 0, generator), {"q"}, lender)
    unpublished = pool.reserve({"q": 4})
    before = pool.used_bytes, pool.free_slots
    for ranks, borrowed, slot in (
        ({"q": 4}, {"q"}, None),
        ({"q": 4}, {"q"}, 99),
        ({"q": 4}, {"q"}, -1),
        ({"q": 4}, {"q"}, unpublished),
        ({"q": 3}, {"q"}, lender),  # another rank
        ({"q": 4, "k": 4}, {"q", "k"}, borrower),  # which borrows that of q
        ({"q": 4}, {"q", "k"}, lender),  # k has no rank
    ):
        with pytest.raises(ValueError, match="B"):
            pool.reserve(ranks, borrowed=borrowed, lender=slot)
        assert (pool.used_bytes, pool.free_slots) == before
    slot = pool.reserve({"q": 4, "k": 4}, borrowed={"q"}, lender=lender)
    w = mean["q"]
    with pytest.raises(ValueError, match="b reserved: False, given: True"):
        pool.write(slot, "q", w.a, w.b, w.scale)
    with pytest.raises(ValueError, match="b reserved: True, given: False"):
        pool.write(slot, "k", mean["k"].a, None, mean["k"].scale)
    pool.write(slot, "q", w.a, None, w.scale)
    with pytest.raises(lk.NotWritten):
        pool.publish(slot)


def test_a_reservation_that_is_given_up_gives_back_what_it_borrowed(generator: torch.Generator) -> None:
    pool = make(64 << 10)
    lender = load(pool, adapter(0, generator))
    slot = pool.reserve({"q": 4}, borrowed={"q"}, lender=lender)
    pool.release(lender)
    assert pool.used_bytes
    pool.release(slot)
    assert pool.used_bytes == 0
