"""The engine's end: starts the stager, says what to read, and takes the pieces. Nothing here waits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from socket import socketpair

from torch import Tensor

from loramux.staging.buffer import StagingBuffer
from loramux.staging.channel import Channel
from loramux.staging.launch import launch_process
from loramux.staging.messages import Cancel, Free, Load, Setup, Staged, ToEngine, ToStager

Launch = Callable[[Connection, StagingBuffer, Setup], Callable[[], object]]
"""Start a stager with its end of the connection, which the caller closes; returns what ends it, for good."""


class StagingEnded(Exception):
    """The stager is gone: killed, or out of memory, or by the page of a file that was cut off under it."""


class Staging:
    """One stager and the buffer that it fills. `pin`: its pieces will be copied to a CUDA device."""

    def __init__(self, setup: Setup, *, pin: bool = False, launch: Launch | None = None) -> None:
        self._setup = setup
        self._launch = launch or launch_process
        self._buffer = StagingBuffer.create(setup.piece_bytes, setup.pieces)
        if pin:
            self._buffer.pin()
        self._held: set[int] = set()  # pieces handed to us and not given back
        self._start()

    def begin(self, load: int, artefact: str, lender: str | None = None) -> None:
        """Read an artefact once those asked for before have ended; `lender` as of `Load`. Raises StagingEnded."""
        self._send(Load(load, artefact, lender))

    def cancel(self, load: int) -> None:
        """Read no more of it. Pieces that are on their way come back by themselves."""
        with suppress(StagingEnded):  # which ends every load
            self._send(Cancel(load))

    def receive(self, load: int) -> ToEngine | None:
        """The next message about `load`, if there is one. Raises StagingEnded."""
        try:
            while (message := self._channel.receive()) is not None:
                if isinstance(message, Staged):
                    self._held.add(message.piece)
                if message.load == load:
                    return message
                if isinstance(message, Staged):
                    self.give_back(message.piece)
        except (EOFError, OSError):
            raise StagingEnded from None
        return None

    def data(self, staged: Staged) -> Tensor:
        """The bytes of a piece that was received, until it is given back."""
        start = self._buffer.start(staged.piece)
        return self._buffer.memory[start : start + staged.nbytes]

    def give_back(self, piece: int) -> None:
        """The device has what was in it."""
        self._held.discard(piece)
        with suppress(StagingEnded):
            self._send(Free(piece))

    def restart(self) -> None:
        """Another stager, after StagingEnded; loads have to be asked for again. Raises OSError if there can be none."""
        self._stop()
        self._start()

    def close(self) -> None:
        self._stop()
        self._buffer.close()

    def _start(self) -> None:
        ours, end = socketpair()
        self._channel = Channel(ours)
        with Connection(end.detach()) as theirs:
            self._end = self._launch(theirs, self._buffer, self._setup)
        for piece in range(self._setup.pieces):
            if piece not in self._held:
                self.give_back(piece)

    def _stop(self) -> None:
        self._channel.close()
        self._end()

    def _send(self, message: ToStager) -> None:
        try:
            self._channel.send(message)
        except OSError:
            raise StagingEnded from None
