"""Memory that the engine and its stager both map, cut into pieces of one size; pinned once, for fast copies."""

from __future__ import annotations

import logging
import mmap
import os
from contextlib import suppress

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class StagingBuffer:
    """`pieces` of `piece_bytes` each in the anonymous file `handle`, which lives while anybody has it open."""

    def __init__(self, handle: int, piece_bytes: int, pieces: int) -> None:
        self.handle = handle
        self.piece_bytes = piece_bytes
        self.memory: Tensor = torch.frombuffer(mmap.mmap(handle, piece_bytes * pieces), dtype=torch.uint8)

    @classmethod
    def create(cls, piece_bytes: int, pieces: int) -> StagingBuffer:
        handle = os.memfd_create("loramux-staging")
        os.ftruncate(handle, piece_bytes * pieces)
        return cls(handle, piece_bytes, pieces)

    def start(self, piece: int) -> int:
        """Where a piece begins in `memory`."""
        return piece * self.piece_bytes

    def pin(self) -> None:
        """Let the CUDA driver copy from it without waiting. Without, copies are right, and hold up the steps."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        result = runtime.cudaHostRegister(self.memory.data_ptr(), self.memory.nbytes, 0)
        if int(result) != 0:
            with suppress(RuntimeError):  # who launches next is told of it: not a step
                torch.zeros(1, device="cuda")
            logger.warning(
                "the staging buffer could not be pinned (CUDA error %d): loads will delay steps", int(result)
            )

    def close(self) -> None:
        os.close(self.handle)
