"""Extents of one arena of bytes: first fit, neighbours merged when freed."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

ALIGNMENT = 128
"""Bytes. One cache line of an H100, and enough for every vector load of every dtype."""


def aligned(nbytes: int) -> int:
    """The smallest multiple of ALIGNMENT that is at least `nbytes`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Extents:
    """Book of the free and taken byte ranges of an arena. Offsets and sizes are multiples of ALIGNMENT."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.free = self.capacity
        # Free ranges by offset, never empty, never touching each other.
        self._offsets = [0] if self.capacity else []
        self._sizes = [self.capacity] if self.capacity else []
        self._taken: dict[int, int] = {}
        self._shared: Counter[int] = Counter()  # how many more have to give it

    @property
    def used(self) -> int:
        return self.capacity - self.free

    @property
    def largest_free(self) -> int:
        return max(self._sizes, default=0)

    def take(self, nbytes: int) -> int | None:
        """Offset of a range of `aligned(nbytes)` bytes, or None if no free range is that long."""
        if nbytes <= 0:
            raise ValueError(f"an extent has at least one byte, not {nbytes}")
        size = aligned(nbytes)
        for i, have in enumerate(self._sizes):
            if have < size:
                continue
            offset = self._offsets[i]
            if have == size:
                del self._offsets[i], self._sizes[i]
            else:
                self._offsets[i] += size
                self._sizes[i] -= size
            self._taken[offset] = size
            self.free -= size
            return offset
        return None

    def take_all(self, sizes: Sequence[int]) -> list[int] | None:
        """An offset for each size, in one range if one is long enough; None, and nothing taken, if they do not fit."""
        starts = [0, *itertools.accumulate(map(aligned, sizes))]
        if (whole := self.take(starts[-1]) if sizes else None) is not None:
            del self._taken[whole]
            offsets = [whole + start for start in starts[:-1]]
            self._taken.update((offset, aligned(size)) for offset, size in zip(offsets, sizes, strict=True))
            return offsets
        offsets = []
        for size in sizes:
            if (offset := self.take(size)) is None:
                for taken in offsets:
                    self.give(taken)
                return None
            offsets.append(offset)
        return offsets

    def share(self, offset: int) -> None:
        """Have the range that `take` returned freed by one `give` more. KeyError if there is none at that offset."""
        if offset not in self._taken:
            raise KeyError(offset)
        self._shared[offset] += 1

    def give(self, offset: int) -> None:
        """Free the range that `take` returned, if nobody shares it. KeyError if there is none at that offset."""
        if self._shared[offset]:
            self._shared[offset] -= 1
            return
        del self._shared[offset]
        size = self._taken.pop(offset)
        self.free += size
        i = bisect_left(self._offsets, offset)
        self._offsets.insert(i, offset)
        self._sizes.insert(i, size)
        if i + 1 < len(self._offsets) and offset + size == self._offsets[i + 1]:
            self._merge(i)
        if i > 0 and self._offsets[i - 1] + self._sizes[i - 1] == offset:
            self._merge(i - 1)

    def _merge(self, i: int) -> None:
        self._sizes[i] += self._sizes[i + 1]
        del self._offsets[i + 1], self._sizes[i + 1]
