"""Copies from the staging buffer to the device, beside the steps: on a stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Copies:
    """Which pieces of the buffer are being copied. On the CPU a copy has ended when it returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._under_way: deque[tuple[int, torch.cuda.Event | None]] = deque()

    def wait_for_steps(self) -> None:
        """Copies issued from now on run after the steps issued until now: these may read what has just been freed."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @contextmanager
    def issue(self, piece: int) -> Iterator[None]:
        """What is copied in the body comes from this piece."""
        if self._stream is None:
            try:
                yield
            finally:
                self._under_way.append((piece, None))
            return
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._under_way.append((piece, event))

    def ended(self) -> Iterator[int]:
        """Pieces whose copies have ended, each once."""
        while self._under_way and _has_run(self._under_way[0][1]):
            yield self._under_way.popleft()[0]

    @property
    def busy(self) -> bool:
        """Whether a copy may still be running, for what `ended` has not told."""
        return bool(self._under_way)


def _has_run(event: torch.cuda.Event | None) -> bool:
    return event is None or bool(event.query())  # type: ignore[no-untyped-call]
