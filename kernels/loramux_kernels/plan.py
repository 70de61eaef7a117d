"""The plan of a step: which slot's adapter serves which token, built once per changed batch on the host.

Tokens are ordered by slot and cut into tiles which never cross slots. The CUDA kernels read tiles from one static
int32 buffer, refreshed by one asynchronous copy; the CPU path reads whole groups.

    buffer = [ counts of tiles | tiles of 16 tokens | tiles of 64 tokens | token ids by slot ]

A tile is (slot, start, count); tiles beyond their count, and all counts of an idle plan, are −1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loramux_kernels.sequences import CountRows, Ints, Sequences

SMALL_TILE, LARGE_TILE = 16, 64
SMALL_STEP = 256
"""Steps padded to at most this many tokens use small tiles: a decode step has few tokens of each adapter."""
TILE_FIELDS = 3
_COUNTS = 2


class Group(NamedTuple):
    """All tokens of one slot: a slice when they are neighbours, else int64 row indices."""

    slot: int
    tokens: slice | Tensor


class Tiles(NamedTuple):
    """Launch view for one padded step: tile length, most tiles there can be, and the buffers the kernels read."""

    length: int
    programs: int
    number: Tensor
    tiles: Tensor
    tokens: Tensor


class Plan:
    """Mutable state of the step. `active` False: no row has an adapter and the ops launch nothing."""

    def __init__(self, *, slots: int, max_requests: int, max_tokens: int, device: torch.device, tiled: bool) -> None:
        self.max_tokens = max_tokens
        self.active = False
        self.tokens = 0
        self.groups: list[Group] = []
        self.token_slots: Ints = np.empty(0, np.int32)
        self.sequences = Sequences(max_tokens=max_tokens, device=device, tiled=tiled)
        self._tiled = tiled
        # A step holds at most this many different slots; each adds at most one tile that is not full.
        self._distinct = min(slots, max_requests)
        small, large = self._count(SMALL_STEP, SMALL_TILE), self._count(max_tokens, LARGE_TILE)
        self._starts = (_COUNTS, _COUNTS + small * TILE_FIELDS, _COUNTS + (small + large) * TILE_FIELDS)
        self._buffer = torch.full((self._starts[2] + max_tokens if tiled else 0,), -1, dtype=torch.int32, device=device)
        self._empty = True

    @property
    def nbytes(self) -> int:
        """Device bytes of the buffers."""
        return self._buffer.nbytes + self.sequences.buffer.nbytes

    def update(self, slots: Ints, lengths: Ints, count_rows: CountRows | None = None) -> None:
        """Plan a step of requests with `lengths` tokens each, in batch order; slot −1 is the base model.

        `count_rows` where some slot's adapter has a capacity.
        """
        tokens = int(lengths.sum())
        if tokens > self.max_tokens:
            raise ValueError(f"a step of {tokens} tokens, the pool was made for {self.max_tokens}")
        self.tokens = tokens
        self.token_slots = np.repeat(slots, lengths)
        keep = np.flatnonzero((slots >= 0) & (lengths > 0))
        self.active = keep.size > 0
        if not self.active:
            self._clear()
            return
        if count_rows is not None:
            self.sequences.update(lengths, count_rows)
        order = keep[np.argsort(slots[keep], kind="stable")]
        by_slot, lens = slots[order], lengths[order].astype(np.int64)
        begin = (np.cumsum(lengths, dtype=np.int64) - lengths)[order]
        total = int(lens.sum())
        # Row of each token in the batch: its request's first row plus its place within the request.
        rows = np.repeat(begin - (np.cumsum(lens) - lens), lens) + np.arange(total)
        first = np.flatnonzero(np.r_[True, by_slot[1:] != by_slot[:-1]])
        distinct, counts = by_slot[first], np.add.reduceat(lens, first)
        starts = np.cumsum(counts) - counts
        if self._tiled:
            self._send(distinct, starts, counts, rows)
        else:
            self.groups = [
                Group(int(s), _span(rows[b : b + n])) for s, b, n in zip(distinct, starts, counts, strict=True)
            ]

    def idle(self, launch: bool) -> None:
        """No adapter in the step. `launch`: the kernels still run, over no tiles (graph capture)."""
        self.active = launch
        self.tokens = 0
        self.token_slots = np.empty(0, np.int32)
        self._clear()

    def tiles(self, padded_tokens: int) -> Tiles:
        """Tiles for an op over `padded_tokens` rows. The grid depends on that number only: a graph can hold it."""
        small, large, tokens = self._starts
        if padded_tokens <= SMALL_STEP:
            count = self._count(padded_tokens, SMALL_TILE)
            return Tiles(SMALL_TILE, count, self._buffer, self._buffer[small:large], self._buffer[tokens:])
        count = self._count(padded_tokens, LARGE_TILE)
        return Tiles(LARGE_TILE, count, self._buffer[1:], self._buffer[large:tokens], self._buffer[tokens:])

    def _count(self, tokens: int, length: int) -> int:
        """Tiles that a step of so many tokens can have."""
        tokens = min(tokens, self.max_tokens)
        return min(tokens, self._distinct + tokens // length)

    def _clear(self) -> None:
        # A graph with adapter kernels may be replayed for a step without adapters: it must find no old tiles.
        self.groups = []
        if not self._empty:
            self._buffer.fill_(-1)
            self._empty = True

    def _send(self, slots: Ints, starts: Ints, counts: Ints, rows: Ints) -> None:
        """Write tiles and token ids to a fresh pinned buffer and copy it without waiting.

        The buffer comes from torch's caching host allocator, which hands memory out again only after the copies
        that read it have run; one buffer of our own would be overwritten under the previous copy.
        """
        head = self._starts[2]
        host = torch.empty(head + rows.size, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        out = host.numpy()
        out[:head] = -1
        out[head:] = rows
        for index, length in enumerate((SMALL_TILE, LARGE_TILE)):
            if length == SMALL_TILE and self.tokens > SMALL_STEP:
                continue
            per_slot = -(-counts // length)
            tiles, at = int(per_slot.sum()), self._starts[index]
            out[index] = tiles
            done = (np.arange(tiles) - np.repeat(np.cumsum(per_slot) - per_slot, per_slot)) * length
            fields = out[at : at + tiles * TILE_FIELDS].reshape(tiles, TILE_FIELDS)
            fields[:, 0] = np.repeat(slots, per_slot)
            fields[:, 1] = np.repeat(starts, per_slot) + done
            fields[:, 2] = np.minimum(np.repeat(counts, per_slot) - done, length)
        self._buffer[: host.numel()].copy_(host, non_blocking=True)
        self._empty = False


def _span(rows: Ints) -> slice | Tensor:
    """Indexing by a slice is a view; by a tensor it is a copy."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == rows.size and bool(np.all(rows[1:] > rows[:-1])):
        return slice(first, last + 1)
    return torch.from_numpy(rows)
