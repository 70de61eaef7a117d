"""The adapter pool: rank rows of every resident adapter in one arena of bytes, and who is where.

A slot goes through reserve → write each module → publish → (served) → release. Until `publish` no step can see it;
after `release` a step that still names it treats those rows as base rows.

Threads: `write` may run in a thread of its own; everything else belongs to the thread that runs the steps.
Streams: copies run on the caller's current CUDA stream. A caller that writes on another stream than the steps' one
makes the latter wait before `publish`, and waits for the running steps before it writes what `release` freed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from loramux_kernels import backends
from loramux_kernels.arena import Extents
from loramux_kernels.errors import NotWritten, PoolFull, RankTooLarge, UnknownModule, UnknownSlot, WrongShape
from loramux_kernels.gates import TokenGate, check_experts
from loramux_kernels.layout import Layout, Part
from loramux_kernels.ops.shrink import h_shape
from loramux_kernels.plan import Ints, Plan
from loramux_kernels.sites import TABLE_HEAD, TABLE_PART, Site, SiteSpec, SlotWeights, accumulator
from loramux_kernels.trace import Trace, Traced

NO_GATES: Mapping[str, TokenGate] = MappingProxyType({})


@dataclass
class _Piece:
    """An adapter's extent at one site."""

    offset: int
    layout: Layout
    weights: SlotWeights


@dataclass
class _Resident:
    pieces: dict[int, _Piece]
    unwritten: set[str]
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
        self.dtype = dtype
        self.slots = slots
        self.max_rank = max_rank
        self.max_tokens = max_tokens
        self._backend = backends.select(backend, self.device, dtype)
        self._extents = Extents(capacity_bytes)
        self._arena = torch.empty(self._extents.capacity, dtype=torch.uint8, device=self.device)
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
                arena=self._arena,
                dtype=dtype,
                table=self._table[:, int(self._columns[i]) : int(self._columns[i + 1])],
                plan=self._plan,
                trace=self._trace,
                first_gate=int(first_gates[i]),
                backend=self._backend,
            )
            for i, spec in enumerate(sites)
        ]
        self._where = {m: (i, j) for i, spec in enumerate(sites) for j, m in enumerate(spec.modules)}
        if len(self._where) != sum(len(s.modules) for s in sites):
            raise ValueError("a module appears in two sites")
        self.site_ids: list[Tensor] = [s.id for s in self._sites]
        self._residents: dict[int, _Resident] = {}
        self._published = np.zeros(slots, dtype=bool)
        self._batch: tuple[bytes, bytes] | None = None

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
        widest = max((s.rows for s in self._sites), default=0)
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
        return self._sites[index].rows

    # ---- adapters

    def bytes_for(
        self,
        ranks: Mapping[str, int],
        gates: Mapping[str, TokenGate] = NO_GATES,
        *,
        mag: Collection[str] = (),
        bias: Collection[str] = (),
    ) -> int:
        """Exact bytes, alignment included, that an adapter takes; arguments as of `reserve`."""
        return sum(layout.nbytes for layout in self._layouts(ranks, gates, mag, bias).values())

    def reserve(
        self,
        ranks: Mapping[str, int],
        gates: Mapping[str, TokenGate] = NO_GATES,
        *,
        mag: Collection[str] = (),
        bias: Collection[str] = (),
    ) -> int:
        """Take a slot and memory for an adapter with these ranks per module; all or nothing.

        A module in `gates` is a mixture of experts: its rank counts the rank rows of all its experts. Modules in
        `mag` multiply the base linear's output, modules in `bias` add to it; they need no rank.
        Raises PoolFull, UnknownModule, RankTooLarge, or ValueError for a gate without rank; then nothing has changed.
        """
        layouts = self._layouts(ranks, gates, mag, bias)
        needed = sum(layout.nbytes for layout in layouts.values())
        if not self.free_slots or needed > self.free_bytes:
            raise self._full(needed)
        offsets: dict[int, int] = {}
        for i, layout in layouts.items():
            offset = self._extents.take(layout.nbytes)
            if offset is None:
                for taken in offsets.values():
                    self._extents.give(taken)
                raise self._full(needed)
            offsets[i] = offset
        slot = next(s for s in range(self.slots) if s not in self._residents)
        pieces = {i: _Piece(offsets[i], lay, self._sites[i].views(offsets[i], lay)) for i, lay in layouts.items()}
        self._residents[slot] = _Resident(pieces, {m for m, rank in ranks.items() if rank}.union(mag, bias))
        return slot

    def write(
        self,
        slot: int,
        module: str,
        a: Tensor,
        b: Tensor,
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
        `mag_O` or `bias_O`. Converts to the pool's dtypes. Raises UnknownModule, UnknownSlot, WrongShape, or
        ValueError for an array too many or too few and for experts that do not exist, before it copies anything.
        """
        i, j = self._find(module)
        resident = self._resident(slot)
        piece = resident.pieces.get(i)
        if piece is None or piece.layout.parts[j] == Part() or resident.published:
            raise UnknownSlot(slot, module)
        part = piece.weights.slices[j]
        copies = {
            "a": (a, piece.weights.a[part.rows]),
            "b": (b, part.b),
            "scale": (scale, piece.weights.scale[part.rows]),
        }
        for name, tensor, target in (
            ("router", router, piece.weights.a[part.gate.logits] if part.gate else None),
            ("expert", expert, part.gate.expert if part.gate else None),
            ("mag", mag, part.mag),
            ("bias", bias, part.bias),
        ):
            if tensor is not None and target is not None:
                copies[name] = (tensor, target)
            elif tensor is not None or target is not None:
                raise ValueError(f"module {module}: {name} reserved: {target is not None}, given: {tensor is not None}")
        for name, (tensor, target) in copies.items():
            if tensor.shape != target.shape:
                raise WrongShape(module, name, tuple(tensor.shape), tuple(target.shape))
        if part.gate is not None and expert is not None:
            check_experts(module, expert, part.gate.rule.weights)
        for tensor, target in copies.values():
            target.copy_(tensor, non_blocking=tensor.is_pinned())
        resident.unwritten.discard(module)
        return sum(target.nbytes for _, target in copies.values())

    def publish(self, slot: int) -> None:
        """Make a written slot visible to steps. Raises NotWritten if a reserved module has no weights yet."""
        resident = self._resident(slot)
        if resident.unwritten:
            raise NotWritten(slot, tuple(sorted(resident.unwritten)))
        row = torch.zeros(self._table.shape[1], dtype=torch.int64, pin_memory=self._table.is_cuda)
        entries = row.numpy()
        for i, piece in resident.pieces.items():
            columns = slice(self._columns[i], self._columns[i + 1])
            entries[columns] = self._sites[i].table_row(piece.offset, piece.layout)
            self._sites[i].slots[slot] = piece.weights
        self._table[slot].copy_(row, non_blocking=True)
        resident.published = True
        self._published[slot] = True
        self._batch = None

    def release(self, slot: int) -> None:
        """Free a slot and its memory, published or not. No running step may use it any more."""
        resident = self._resident(slot)
        for i, piece in resident.pieces.items():
            self._sites[i].slots[slot] = None
            self._extents.give(piece.offset)
        del self._residents[slot]
        self._published[slot] = False
        self._batch = None

    # ---- steps

    def set_batch(self, slots: Ints, lengths: Ints) -> None:
        """Plan the coming step: slot and number of tokens of each request, int32, in batch order.

        A slot that is not published counts as −1, the base model. Costs nothing while the batch stays the same.
        """
        batch = (slots.tobytes(), lengths.tobytes())
        if batch == self._batch:
            return
        known = (slots >= 0) & (slots < self.slots)
        known &= self._published[np.where(known, slots, 0)]
        self._plan.update(np.where(known, slots, -1), lengths)
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

    def _gates(self, slot: int) -> dict[TokenGate, list[int]]:
        """Gates of a slot's adapter by what they decide about experts, as the trace numbers them."""
        found: dict[TokenGate, list[int]] = {}
        for i, piece in self._residents[slot].pieces.items():
            for j, part in enumerate(piece.layout.parts):
                if part.gate is not None:
                    found.setdefault(part.gate.router, []).append(self._sites[i].first_gate + j)
        return found

    def _find(self, module: str) -> tuple[int, int]:
        try:
            return self._where[module]
        except KeyError:
            raise UnknownModule(module) from None

    def _resident(self, slot: int) -> _Resident:
        try:
            return self._residents[slot]
        except KeyError:
            raise UnknownSlot(slot) from None

    def _full(self, needed: int) -> PoolFull:
        return PoolFull(
            needed_bytes=needed,
            free_bytes=self.free_bytes,
            largest_free_bytes=self._extents.largest_free,
            free_slots=self.free_slots,
        )

    def _layouts(
        self,
        ranks: Mapping[str, int],
        gates: Mapping[str, TokenGate],
        mag: Collection[str],
        bias: Collection[str],
    ) -> dict[int, Layout]:
        """Layout per touched site index."""
        by_site: dict[int, list[Part]] = {}
        for module in dict.fromkeys((*ranks, *gates, *mag, *bias)):
            i, j = self._find(module)
            part = Part(ranks.get(module, 0), gates.get(module), module in mag, module in bias)
            if part.rank > self.max_rank:
                raise RankTooLarge(module, part.rank, self.max_rank)
            if part.rank < 0:
                raise ValueError(f"module {module}: rank {part.rank}")
            if part.gate and not part.rank:
                raise ValueError(f"module {module}: a gate, but no rank")
            if part != Part():
                by_site.setdefault(i, [Part()] * len(self._sites[i].spec.d_outs))[j] = part
        specs, item = {i: self._sites[i].spec for i in sorted(by_site)}, self.dtype.itemsize
        return {i: Layout.of(spec.d_in, spec.d_outs, tuple(by_site[i]), item) for i, spec in specs.items()}
