"""The process beside the engine's: reads artefacts, converts them, and puts their images into the staging buffer."""

from __future__ import annotations

import os
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from loramux.staging.buffer import StagingBuffer
from loramux.staging.lending import borrowable
from loramux.staging.messages import Cancel, Failed, Free, Load, Planned, Setup, Staged, ToEngine
from loramux.staging.placement import pool_arrays
from loramux_adapters import LoweredAdapter, open_artefact
from loramux_adapters.token_gates import reservation
from loramux_kernels import KernelError, Layout, Layouts, Memory

SITES_PER_PIECE = 16
"""The engine does some work per site, however few bytes it has."""
_PARENT_CHECK_S = 1.0


class _Cancelled(Exception):
    """The engine does not want this load any more."""


class _EngineGone(Exception):
    """Nobody is at the other end."""


class Stager:
    """One load at a time, in the order in which they are asked for."""

    def __init__(self, connection: Connection, buffer: StagingBuffer, setup: Setup) -> None:
        self._connection = connection
        self._buffer = buffer
        self._geometry, self._biases = setup.geometry, setup.base_biases
        self._parent = os.getppid()
        self._free: deque[int] = deque()
        self._loads: deque[Load] = deque()
        self._at_work: int | None = None

    def run(self) -> None:
        """Serve until the engine closes its end or is gone."""
        try:
            while True:
                while not self._loads:
                    self._receive()
                load = self._loads.popleft()
                self._at_work = load.load
                with suppress(_Cancelled):
                    self._stage(load)
                self._at_work = None
        except _EngineGone:
            pass

    def _stage(self, load: Load) -> None:
        try:
            adapter = open_artefact(Path(load.artefact))
        except Exception:  # whatever it is, the artefact is not what it should be
            message = "The prepared adapter could not be read."
            self._send(Failed(load.load, "adapter_unreadable", message, traceback.format_exc()))
            return
        try:
            borrowed = borrowable(adapter, load.lender) if load.lender is not None else frozenset()
            layouts = self._geometry.layouts(**reservation(adapter, self._biases), borrowed=borrowed)
            self._send(Planned(load.load, layouts, bool(adapter.gates)))
            self._put(load.load, adapter, layouts)
        except (_Cancelled, _EngineGone):
            raise
        except KernelError as error:
            self._send(Failed(load.load, "adapter_unservable", str(error)))
        except Exception as error:  # nobody calls this: every failure becomes the load's result
            message = f"The adapter could not be copied: {error}"
            self._send(Failed(load.load, "internal_error", message, traceback.format_exc()))

    def _put(self, load: int, adapter: LoweredAdapter, layouts: Layouts) -> None:
        """Stage the images of all sites, one behind the other."""
        limit = self._buffer.piece_bytes
        # Only what is longer than a piece is put together elsewhere first.
        scratch = torch.empty(
            max((x.nbytes for x in layouts.values() if x.nbytes > limit), default=0), dtype=torch.uint8
        )
        pieces = _Pieces(self, load)
        try:
            for i, layout in layouts.items():
                if layout.nbytes <= limit:
                    self._lay_out(adapter, i, layout, self._buffer.memory, pieces.room(layout.nbytes))
                else:
                    self._lay_out(adapter, i, layout, scratch, 0)
                    pieces.spread(scratch[: layout.nbytes])
            pieces.end()
        finally:
            pieces.drop()

    def _lay_out(self, adapter: LoweredAdapter, index: int, layout: Layout, memory: Tensor, offset: int) -> None:
        """Convert and copy all that the adapter has of its own at a site."""
        site = self._geometry.sites[index]
        weights = Memory.of(memory, self._geometry.dtype).at(site, offset, layout)
        for j in sorted(layout.present):
            module = site.modules[j]
            arrays = pool_arrays(adapter.sites[module], adapter.gates, self._biases.get(module))
            weights.fill(j, module, **vars(replace(arrays, b=None) if j in layout.borrowed else arrays))

    def take(self) -> int:
        """A piece of the buffer to write into, once there is one. Raises _Cancelled."""
        while not self._free:
            self._receive()
        return self._free.popleft()

    def drop(self, piece: int) -> None:
        """A piece that nothing was said about."""
        self._free.append(piece)

    def hand_over(self, staged: Staged) -> None:
        """Give a piece to the engine; hear what it has said meanwhile. Raises _Cancelled."""
        self._send(staged)
        while self._connection.poll():
            self._receive()

    @property
    def buffer(self) -> StagingBuffer:
        return self._buffer

    def _receive(self) -> None:
        """One message. Raises _Cancelled if it is about the load at work."""
        try:
            while not self._connection.poll(_PARENT_CHECK_S):
                if os.getppid() != self._parent:  # the engine died, and somebody else holds its end open
                    raise _EngineGone
            message = self._connection.recv()
        except (EOFError, OSError):
            raise _EngineGone from None
        match message:
            case Free(piece):
                self._free.append(piece)
            case Load():
                self._loads.append(message)
            case Cancel(load):
                self._loads = deque(other for other in self._loads if other.load != load)
                if load == self._at_work:
                    raise _Cancelled

    def _send(self, message: ToEngine) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise _EngineGone from None


class _Pieces:
    """Puts the sites of one load into pieces, a site's bytes never across two of them if they fit into one."""

    def __init__(self, stager: Stager, load: int) -> None:
        self._stager = stager
        self._load = load
        self._piece: int | None = None
        self._used = self._sites = 0

    def room(self, nbytes: int) -> int:
        """Where in the buffer the next `nbytes`, a piece's at most, have to go."""
        if self._used + nbytes > self._stager.buffer.piece_bytes or self._sites == SITES_PER_PIECE:
            self._hand_over(last=False)
        piece = self._begun()
        at = self._stager.buffer.start(piece) + self._used
        self._used += nbytes
        self._sites += 1
        return at

    def spread(self, image: Tensor) -> None:
        """Copy a site that is longer than a piece."""
        for part in torch.split(image, self._stager.buffer.piece_bytes):
            at = self.room(part.numel())
            self._stager.buffer.memory[at : at + part.numel()] = part

    def end(self) -> None:
        self._begun()
        self._hand_over(last=True)

    def drop(self) -> None:
        """Keep what was not handed over."""
        if self._piece is not None:
            self._stager.drop(self._piece)
            self._piece = None

    def _begun(self) -> int:
        if self._piece is None:
            self._piece = self._stager.take()
            self._used = self._sites = 0
        return self._piece

    def _hand_over(self, last: bool) -> None:
        assert self._piece is not None
        staged = Staged(self._load, self._piece, self._used, last)
        self._piece = None
        self._stager.hand_over(staged)
