"""What the routers said in a step: the logits of its mixtures, kept when somebody asks.

While it is on, the expand writes each mixture's logits l_TE, as it sees them before the gate, into one static buffer;
rows are tokens of the step. Only the first TRACE_TOKENS rows are kept: engines put decoding requests first, and one
step of prompts would need a hundred MiB. Results never depend on it, and plain adapters do not touch it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loramux_kernels.gates import MAX_EXPERTS, TokenGate
from loramux_kernels.sequences import Ints

TRACE_TOKENS = 256

GatesOfSlot = Mapping[int, Mapping[TokenGate, list[int]]]
"""slot -> rule, without groups of experts -> which gates of the pool follow it there."""


class Routed(NamedTuple):
    """Logits of one slot's gates that share a rule: `rows_N` of the step, `logits` [gates, N, logits of the rule].

    A gate's number is its module's among all modules of the pool's sites, in order.
    """

    slot: int
    rule: TokenGate
    gates: tuple[int, ...]
    rows: Ints
    logits: Tensor


class Traced:
    """A step's logits on their way to the host. `ready` once they are there; reading before that waits."""

    def __init__(self, logits: Tensor, token_slots: Ints, gates: GatesOfSlot) -> None:
        self._token_slots = token_slots
        self._gates = gates
        self._copied: torch.cuda.Event | None = None
        if logits.is_cuda:
            self._logits = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
            self._logits.copy_(logits, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        else:
            self._logits = logits.clone()

    @property
    def ready(self) -> bool:
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[Routed]:
        if self._copied is not None:
            self._copied.synchronize()
        for slot, rules in self._gates.items():
            rows = np.flatnonzero(self._token_slots == slot)
            if not rows.size:
                continue
            of_slot = self._logits[:, torch.from_numpy(rows)]
            for rule, gates in rules.items():
                yield Routed(slot, rule, tuple(gates), rows, of_slot[gates, :, : rule.logits])


class Trace:
    """The buffer of one pool with `gates` slices in all its sites, and whether the expand writes to it."""

    def __init__(self, gates: int, device: torch.device) -> None:
        self.buffer = torch.zeros(gates, TRACE_TOKENS, MAX_EXPERTS, dtype=torch.float32, device=device)
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        """What kernels read, so that a captured graph serves steps with and without a trace."""
        self.on = False

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def switch(self, on: bool) -> None:
        if on != self.on:
            self.on = on
            self.flag.fill_(int(on))

    def put(self, gate: int, tokens: slice | Tensor, logits: Tensor) -> None:
        """Keep `logits_TE` of these rows of the step: for backends that run on the host."""
        rows = torch.arange(TRACE_TOKENS)[tokens] if isinstance(tokens, slice) else tokens
        kept = rows < TRACE_TOKENS
        self.buffer[gate, rows[kept], : logits.shape[1]] = logits[: len(rows)][kept].float()

    def take(self, token_slots: Ints, gates: GatesOfSlot) -> Traced:
        """Start copying the last step's logits. `token_slots`: its plan's, by row."""
        count = min(len(token_slots), TRACE_TOKENS)
        return Traced(self.buffer[:, :count], token_slots[:count], gates)
