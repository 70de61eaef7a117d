"""Extents: whatever is taken and freed in whatever order, the book is right."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_kernels.arena import ALIGNMENT, Extents, aligned

CAPACITY = 40 * ALIGNMENT + 5
# A positive number takes so many bytes; a negative one frees the (−n)-th of the extents then taken.
STEPS = st.lists(st.integers(-30, 12 * ALIGNMENT).filter(bool), max_size=80)


@settings(deadline=None)
@given(STEPS)
def test_extents_never_overlap_and_everything_comes_back(steps: list[int]) -> None:
    extents, taken = Extents(CAPACITY), {}
    for step in steps:
        if step > 0:
            largest = extents.largest_free
            offset = extents.take(step)
            # Refused exactly when no free piece is long enough.
            assert (offset is None) == (aligned(step) > largest)
            if offset is not None:
                taken[offset] = aligned(step)
        elif taken:
            offset = list(taken)[-step % len(taken)]
            del taken[offset]
            extents.give(offset)
        spans = sorted(taken.items())
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
        assert all(a % ALIGNMENT == 0 and a + n <= CAPACITY for a, n in spans)
        assert extents.used == sum(taken.values()) == extents.capacity - extents.free
        # The largest hole between the spans, found without the free list.
        edges = [0, *(e for a, n in spans for e in (a, a + n)), extents.capacity]
        assert extents.largest_free == max(b - a for a, b in zip(edges[::2], edges[1::2], strict=True))
    for offset in taken:
        extents.give(offset)
    assert extents.take(extents.capacity) == 0


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9 * ALIGNMENT), max_size=12),
    st.sets(st.integers(0, 11)),
    st.lists(st.integers(1, 6 * ALIGNMENT), max_size=8),
)
def test_many_extents_are_taken_together_or_not_at_all(before: list[int], freed: set[int], sizes: list[int]) -> None:
    extents, one_by_one = Extents(CAPACITY), Extents(CAPACITY)
    for book in (extents, one_by_one):
        for i, offset in enumerate([book.take(n) for n in before]):
            if offset is not None and i in freed:
                book.give(offset)
    state, largest = (extents.used, extents.largest_free), extents.largest_free
    offsets = extents.take_all(sizes)
    if offsets is None:
        assert (extents.used, extents.largest_free) == state
        assert None in [one_by_one.take(n) for n in sizes]
        return
    lengths = [aligned(n) for n in sizes]
    assert extents.used == state[0] + sum(lengths)
    if sizes and sum(lengths) <= largest:
        assert offsets == [offsets[0] + start for start in itertools.accumulate(lengths[:-1], initial=0)]
    for offset in offsets:
        extents.give(offset)
    assert (extents.used, extents.largest_free) == state


def test_an_extent_is_freed_once() -> None:
    extents = Extents(CAPACITY)
    offset = extents.take(1)
    assert offset is not None
    extents.give(offset)
    with pytest.raises(KeyError):
        extents.give(offset)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_nothing_is_not_an_extent(nbytes: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Extents(CAPACITY).take(nbytes)
