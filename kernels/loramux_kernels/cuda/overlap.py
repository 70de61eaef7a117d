"""The shrink beside the base linear: a second stream that leaves the step's stream and joins it again.

    step's stream     … x ──┬── base linear ──┬── expand …
    side stream             └─── shrink ──────┘

Inside a graph capture the same calls become edges of the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Fork:
    """Side stream of one device. `beside` and `join` alternate."""

    def __init__(self, device: int) -> None:
        # Higher priority: its few blocks are placed before the base linear fills the device.
        self._side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._left = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def beside(self, stream: torch.cuda.Stream) -> Iterator[int]:
        """The raw side stream, which follows what `stream` holds now; `join` will wait for what is enqueued inside."""
        self._left.record(stream)
        self._side.wait_event(self._left)
        yield self._side.cuda_stream
        self._done.record(self._side)

    def join(self, stream: torch.cuda.Stream) -> None:
        """Let `stream` wait for the side stream."""
        stream.wait_event(self._done)


@functools.cache
def fork(device: int) -> Fork:
    """The device's only one."""
    return Fork(device)
