"""The adapter pool: rank rows of every resident adapter in one arena of bytes, and who is where.

A slot goes through reserve → write each module, or the image piece by piece → publish → (served) → release. Until
`publish` no step can see it; after `release` a step that still names it treats those rows as base rows.
A slot may borrow B, module by module, from a published one, the *lender*: what it reads there stays in memory until
both are released, in whatever order.

Threads: everything belongs to the thread that runs the steps. What takes long can be done elsewhere, in another
process too: `geometry` makes the layouts that `reserve_laid_out` takes, and with them an *image* is put together: the
extents of the adapter's sites one behind the other, byte for byte as they will lie in the arena.
Streams: copies run on the caller's current CUDA stream. A caller that writes on another stream than the steps' one
has its copies run before `publish`, and lets that stream wait after `reserve` for the steps that were issued before:
they may read what a `release` has freed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from loramux_kernels import backends
from loramux_kernels.arena import Extents
from loramux_kernels.errors import NotWritten, PoolFull, UnknownSlot
from loramux_kernels.gates import TokenGate
from loramux_kernels.geometry import NO_BANDS, NO_GATES, Geometry, Layouts
from loramux_kernels.layout import Layout
from loramux_kernels.ops.shrink import h_shape
from loramux_kernels.plan import Plan
from loramux_kernels.sequences import ROWS_PER_SEQUENCE, CountRows, Ints
from loramux_kernels.sites import TABLE_HEAD, TABLE_PART, Site, SiteSpec, accumulator
from loramux_kernels.trace import Trace, Traced
from loramux_kernels.weights import Memory, SlotWeights


@dataclass
class _Piece:
    """An adapter's extent at one site."""

    offset: int
    layout: Layout
    lender: int | None = None  # the extent that it borrows from
    lent: Mapping[int, int] = field(default_factory=dict)  # slice -> where its B begins there
    weights: SlotWeights | None = None


@dataclass
class _Resident:
    """An adapter in the arena: its extents by site, and what is still to come."""

    pieces: dict[int, _Piece]
    missing: dict[int, set[int]]  # site -> its slices without weights
    image: deque[int]  # sites whose bytes are still to come, if they come as an image
    begun: int = 0  # bytes of the first of these that have come
    published: bool = False


class AdapterPool:
    """Memory, tables and the running step's plan for all sites of one model on one device.

    `capacity_bytes` of adapter weights are allocated at once. `max_rank` bounds the rank of one module,
    `max_tokens` and `max_requests` one step. `backend` names another implementation than the device's own.
    """

    # Engines load models in inference mode; tensors made there could not be written to outside of it.
    @torch.inference_mode(False)
    def __init__(
        self,
        sites: Sequence[SiteSpec],
        *,
        capacity_bytes: int,
        slots: int,
        max_rank: int,
        max_tokens: int,
        max_requests: int,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: str | None = None,
    ) -> None:
        if min(slots, max_rank, max_tokens, max_requests) < 1:
            raise ValueError("slots, max_rank, max_tokens and max_requests must be positive")
        self.device = torch.device(device)
        self._backend = backends.select(backend, self.device, dtype)
        self.geometry = Geometry(tuple(sites), dtype, max_rank, ROWS_PER_SEQUENCE * max_requests, self._backend.tiled)
        self.dtype = dtype
        self.slots = slots
        self.max_tokens = max_tokens
        self._extents = Extents(capacity_bytes)
        self._arena = torch.empty(self._extents.capacity, dtype=torch.uint8, device=self.device)
        self._memory = Memory.of(self._arena, dtype)
        self._plan = Plan(
            slots=slots,
            max_requests=max_requests,
            max_tokens=max_tokens,
            device=self.device,
            tiled=self._backend.tiled,
        )
        widths = [TABLE_HEAD + TABLE_PART * len(s.d_outs) for s in sites]
        self._columns = np.cumsum([0, *widths])
        first_gates = np.cumsum([0, *(len(s.modules) for s in sites)])
        self._trace = Trace(int(first_gates[-1]), self.device)
        # One row of a slot holds all sites, so that publishing is one copy.
        self._table = torch.zeros(slots, int(self._columns[-1]), dtype=torch.int64, device=self.device)
        self._sites = [
            Site(
                spec,
                max_rank=max_rank,
                slots=slots,
                arena=self._memory,
                table=self._table[:, int(self._columns[i]) : int(self._columns[i + 1])],
                plan=self._plan,
                trace=self._trace,
                first_gate=int(first_gates[i]),
                backend=self._backend,
            )
            for i, spec in enumerate(sites)
        ]
        self.site_ids: list[Tensor] = [s.id for s in self._sites]
        self._residents: dict[int, _Resident] = {}
        self._rows: dict[int, Tensor] = {}  # on the host: what the table will say of reserved slots
        self._published = np.zeros(slots, dtype=bool)
        self._limited = np.zeros(slots, dtype=bool)
        self._batch: tuple[bytes, ...] | None = None

    # ---- sizes

    @property
    def capacity_bytes(self) -> int:
        return self._extents.capacity

    @property
    def used_bytes(self) -> int:
        return self._extents.used

    @property
    def free_bytes(self) -> int:
        return self._extents.free

    @property
    def free_slots(self) -> int:
        return self.slots - len(self._residents)

    @property
    def overhead_bytes(self) -> int:
        """Device bytes beside `capacity_bytes`: tables, plan, trace, and the widest h of the longest step."""
        widest = max((s.width for s in self._sites), default=0)
        rows, width = h_shape(self.max_tokens, widest, self.device)
        fixed = self._table.nbytes + self._plan.nbytes + self._trace.nbytes
        if self._backend.overhead is not None:
            fixed += self._backend.overhead(self._plan, self.device)
        return fixed + rows * width * accumulator(self.dtype).itemsize

    @property
    def active(self) -> bool:
        """Whether the ops do anything in this step."""
        return self._plan.active

    def resident(self) -> tuple[int, ...]:
        """The published slots, ascending."""
        return tuple(int(s) for s in np.flatnonzero(self._published))

    def h_width(self, index: int) -> int:
        """Columns of h at site `index`: the `rows` argument of the shrink op."""
        return self._sites[index].width

    # ---- adapters

    def bytes_for(
        self,
        ranks: Mapping[str, int],
        gates: Mapping[str, TokenGate] = NO_GATES,
        *,
        mag: Collection[str] = (),
        bias: Collection[str] = (),
        borrowed: Collection[str] = (),
        bands: Mapping[str, int] = NO_BANDS,
    ) -> int:
        """Exact bytes, alignment included, that an adapter takes; arguments as of `reserve`."""
        layouts = self.geometry.layouts(ranks, gates, mag=mag, bias=bias, borrowed=borrowed, bands=bands)
        return sum(layout.nbytes for layout in layouts.values())

    def reserve(
        self,
        ranks: Mapping[str, int],
        gates: Mapping[str, TokenGate] = NO_GATES,
        *,
        mag: Collection[str] = (),
        bias: Collection[str] = (),
        borrowed: Collection[str] = (),
        bands: Mapping[str, int] = NO_BANDS,
        lender: int | None = None,
    ) -> int:
        """Take a slot and memory for an adapter with these ranks per module; all or nothing.

        A module in `gates` is a mixture of experts: its rank counts the rank rows of all its experts. Modules in
        `mag` multiply the base linear's output, modules in `bias` add to it; they need no rank. Modules in `borrowed`
        have the B of the published slot `lender`, which is theirs as long as they need it. `bands`: of a module whose
        A and B are block-diagonal, the number of blocks, all of equal rank and one behind the other; they are packed
        where the kernels can do with that.
        Raises PoolFull, UnknownModule, RankTooLarge, or ValueError for a gate without rank, for a rank that bands do
        not divide and for a B that the lender does not have, or has borrowed itself; then nothing has changed.
        """
        layouts = self.geometry.layouts(ranks, gates, mag=mag, bias=bias, borrowed=borrowed, bands=bands)
        return self.reserve_laid_out(layouts, lender)

    def reserve_laid_out(self, layouts: Layouts, lender: int | None = None) -> int:
        """`reserve` for layouts that this pool's geometry has made. Raises PoolFull, or ValueError for something to
        borrow that `lender` does not have; then nothing has changed."""
        lent = self._lent(layouts, lender)
        sizes = [layout.nbytes for layout in layouts.values()]
        offsets = self._extents.take_all(sizes) if self.free_slots and sum(sizes) <= self.free_bytes else None
        if offsets is None:
            raise PoolFull(
                needed_bytes=sum(sizes),
                free_bytes=self.free_bytes,
                largest_free_bytes=self._extents.largest_free,
                free_slots=self.free_slots,
            )
        slot = next(s for s in range(self.slots) if s not in self._residents)
        pieces = {i: _Piece(offset, lay) for (i, lay), offset in zip(layouts.items(), offsets, strict=True)}
        for i, (extent, b) in lent.items():
            self._extents.share(extent)
            pieces[i].lender, pieces[i].lent = extent, b
        self._residents[slot] = _Resident(
            pieces=pieces,
            missing={i: set(layout.present) for i, layout in layouts.items()},
            image=deque(layouts),
        )
        # Of torch's caching host allocator, which hands it out again only after the copy that reads it has run.
        self._rows[slot] = torch.zeros(self._table.shape[1], dtype=torch.int64, pin_memory=self._table.is_cuda)
        return slot

    def write(
        self,
        slot: int,
        module: str,
        a: Tensor,
        b: Tensor | None,
        scale: Tensor,
        *,
        router: Tensor | None = None,
        expert: Tensor | None = None,
        mag: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> int:
        """Copy one module's `a_RI`, `b_RO` (B transposed) and `scale_R` into the reservation; returns bytes copied.

        A module reserved with a gate, and no other, needs `router_EI`, a row per logit of the gate, and `expert_R`:
        which expert, or group of experts, each rank row belongs to. Likewise one reserved with mag or bias needs
        `mag_O` or `bias_O`, and one that borrows has no `b`. One with bands brings its zeros, too. Converts to the
        pool's dtypes. Raises UnknownModule, UnknownSlot, WrongShape, or ValueError for an array too many or too few,
        for experts that do not exist and for anything outside of the bands, before it copies anything.
        """
        i, j = self.geometry.find(module)
        resident = self._resident(slot)
        piece = resident.pieces.get(i)
        if piece is None or j not in piece.layout.present or resident.published:
            raise UnknownSlot(slot, module)
        copied = self._weights(i, piece).fill(j, module, a, b, scale, router=router, expert=expert, mag=mag, bias=bias)
        resident.missing[i].discard(j)
        if not resident.missing[i]:
            self._describe(slot, i)
        return copied

    def write_image(self, slot: int, image: Tensor) -> None:
        """Copy the next bytes of a reservation's image (uint8, of any number). Nothing in them is checked.

        Raises UnknownSlot, or ValueError beyond the image's end.
        """
        resident = self._resident(slot)
        while image.numel():
            if resident.published or not resident.image:
                raise ValueError(f"slot {slot}: {image.numel()} bytes more than its image has")
            i = resident.image[0]
            piece = resident.pieces[i]
            count = min(image.numel(), piece.layout.nbytes - resident.begun)
            at = piece.offset + resident.begun
            self._arena[at : at + count].copy_(image[:count], non_blocking=True)
            image = image[count:]
            resident.begun += count
            if resident.begun == piece.layout.nbytes:
                resident.image.popleft()
                resident.begun = 0
                resident.missing[i].clear()
                self._describe(slot, i)

    def publish(self, slot: int) -> None:
        """Make a written slot visible to steps. Raises NotWritten if a reserved module has no weights yet."""
        resident = self._resident(slot)
        if missing := [self.geometry.sites[i].modules[j] for i, slices in resident.missing.items() for j in slices]:
            raise NotWritten(slot, tuple(sorted(missing)))
        self._table[slot].copy_(self._rows.pop(slot), non_blocking=True)
        resident.published = True
        self._published[slot] = True
        self._limited[slot] = any(piece.layout.limited for piece in resident.pieces.values())
        self._batch = None

    def release(self, slot: int) -> None:
        """Free a slot and its memory, published or not; what others borrow of it, when they are released too. No
        running step may use it any more."""
        resident = self._resident(slot)
        for i, piece in resident.pieces.items():
            self._sites[i].slots[slot] = None
            self._extents.give(piece.offset)
            if piece.lender is not None:
                self._extents.give(piece.lender)
        del self._residents[slot]
        self._rows.pop(slot, None)
        self._published[slot] = self._limited[slot] = False
        self._batch = None

    # ---- steps

    def limited(self, slots: Ints) -> Ints:
        """Places in `slots` of the published ones whose adapter has a gate with a capacity."""
        if not self._limited.any():  # nearly always, and asked for every step
            return np.empty(0, np.intp)
        known = (slots >= 0) & (slots < self.slots)
        return np.flatnonzero(known & self._limited[np.where(known, slots, 0)])

    def set_batch(self, slots: Ints, lengths: Ints, counts: CountRows | None = None) -> None:
        """Plan the coming step: slot and number of tokens of each request, int32, in batch order.

        `counts`: needed where a slot is `limited`; then the step counts its tokens, and each set_batch is one step.
        A slot that is not published counts as −1, the base model. Costs nothing while the batch stays the same.
        Raises ValueError for a limited slot without rows of counts of its own, and plans nothing then.
        """
        batch = (slots.tobytes(), lengths.tobytes(), *(rows.tobytes() for rows in counts or ()))
        if batch == self._batch:
            return
        known = (slots >= 0) & (slots < self.slots)
        known &= self._published[np.where(known, slots, 0)]
        self._check(self.limited(slots), counts)
        self._plan.update(np.where(known, slots, -1), lengths, counts)
        self._batch = batch

    def set_idle(self, launch: bool) -> None:
        """A step without requests: profiling and graph capture.

        `launch`: the kernels run over an empty plan, as a graph that will serve adapters needs. Otherwise the ops
        return at once, as a graph for base-only steps needs.
        """
        self._plan.idle(launch)
        self._batch = None

    def trace(self, on: bool) -> None:
        """Whether the coming steps keep the router logits of their mixtures, for `take_trace`."""
        self._trace.switch(on)

    def take_trace(self) -> Traced:
        """The logits that the last step kept; call it after the step's ops were issued, on the same stream."""
        return self._trace.take(self._plan.token_slots, {slot: self._gates(slot) for slot in self.resident()})

    def warmup(self) -> None:
        """Compile every kernel variant, which must not happen while a graph is captured. Leaves the pool idle."""
        if self._backend.warmup is not None:
            self.set_idle(True)
            self._backend.warmup(self._sites, self._plan)
        self.set_idle(False)

    # ---- helpers

    def _check(self, limited: Ints, counts: CountRows | None) -> None:
        """Kernels trust these numbers: a wrong one would be a write anywhere."""
        if not limited.size:
            return
        if counts is None:
            raise ValueError("an adapter with a capacity in the step, and no rows of counts")
        read, write = counts.read[limited], counts.write[limited]
        end = self.geometry.count_rows
        if (read < -1).any() or (read >= end).any() or (write < 0).any() or (write >= end).any():
            raise ValueError(f"rows of counts must be from 0 to {end - 1}")
        if np.unique(write).size < write.size or np.isin(write, read).any():
            raise ValueError("a row of counts that two requests of a step write, or that is read and written")

    def _gates(self, slot: int) -> dict[TokenGate, list[int]]:
        """Gates of a slot's adapter by what they decide about experts, as the trace numbers them."""
        found: dict[TokenGate, list[int]] = {}
        for i, piece in self._residents[slot].pieces.items():
            for j, part in enumerate(piece.layout.parts):
                if part.gate is not None:
                    found.setdefault(part.gate.router, []).append(self._sites[i].first_gate + j)
        return found

    def _lent(self, layouts: Layouts, lender: int | None) -> dict[int, tuple[int, dict[int, int]]]:
        """Site -> the lender's extent there, and for each slice that borrows where in the arena its B begins."""
        source = None if lender is None else self._residents.get(lender)
        pieces = source.pieces if source is not None and source.published else {}
        found = {}
        for i in (i for i, layout in layouts.items() if layout.borrowed):
            piece, b = pieces.get(i), {}
            for j in layouts[i].borrowed:
                own, rank = None if piece is None else piece.layout.b[j], layouts[i].parts[j].rank
                alike = piece is not None and (piece.layout.parts[j].rank, piece.layout.bands) == (
                    rank,
                    layouts[i].bands,
                )
                if piece is None or own is None or not alike:
                    module = self.geometry.sites[i].modules[j]
                    raise ValueError(f"slot {lender} has no B of its own of rank {rank} to lend for module {module}")
                b[j] = piece.offset + own
            if piece is not None:
                found[i] = piece.offset, b
        return found

    def _weights(self, site: int, piece: _Piece) -> SlotWeights:
        if piece.weights is None:
            piece.weights = self._memory.at(self.geometry.sites[site], piece.offset, piece.layout, piece.lent)
        return piece.weights

    def _describe(self, slot: int, site: int) -> None:
        """Prepare what steps will read about a site whose bytes have all come."""
        piece = self._residents[slot].pieces[site]
        columns = slice(self._columns[site], self._columns[site + 1])
        self._rows[slot].numpy()[columns] = self._sites[site].table_row(piece.offset, piece.layout, piece.lent)
        if not self._backend.tiled:
            self._sites[site].slots[slot] = self._weights(site, piece)

    def _resident(self, slot: int) -> _Resident:
        try:
            return self._residents[slot]
        except KeyError:
            raise UnknownSlot(slot) from None
