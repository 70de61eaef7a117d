"""`loramux serve` as two processes: the server with its engine, and this one, which starts it again when it dies.

A server that never became ready is not started again: what kept it from starting would do so once more. One that was
ready is, with the same command; its adapters come back from the durable registry. Stops (SIGINT, SIGTERM) are passed
on and waited for. If this process is killed, so is the server: nobody would be left to look after it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

logger = logging.getLogger(__name__)

#: Names the pipe over which the server says that it is ready.
READY_VARIABLE = "LORAMUX_READY_FD"
#: So many crashes within so many seconds are a fault that starting again does not mend.
MAX_CRASHES, WINDOW_S = 5, 600.0
_PAUSE_S = 1.0
_STOP_S = 30.0
_PR_SET_PDEATHSIG = 1


def announce_ready() -> None:
    """Called in the server, once: from now on a crash is worth a restart. Without a supervisor it does nothing."""
    if (descriptor := os.environ.pop(READY_VARIABLE, None)) is not None:
        os.write(int(descriptor), b"1")
        os.close(int(descriptor))


def is_server() -> bool:
    """Whether this process was started by a supervisor."""
    return READY_VARIABLE in os.environ


def server_command(argv: Sequence[str]) -> list[str]:
    """The command line of the server process."""
    return [sys.executable, "-m", "loramux", "serve", *argv]


def supervise(command: Sequence[str]) -> int:
    """Run `command` until it ends by itself before it was ready, is stopped, or crashes too often.

    Returns its exit status, 128 + n if signal n ended it, as a shell says it.
    """
    crashes: deque[float] = deque(maxlen=MAX_CRASHES)
    with _Signals() as signals:
        while True:
            status, was_ready = _run(command, signals)
            if signals.stopping or not was_ready:
                return status
            crashes.append(time.monotonic())
            if len(crashes) == MAX_CRASHES and crashes[-1] - crashes[0] < WINDOW_S:
                logger.error("the server ended %d times in %.0f s: giving up", MAX_CRASHES, crashes[-1] - crashes[0])
                return status or 1
            logger.error("the server ended (%s): starting it again", _reason(status))
            time.sleep(_PAUSE_S)


def _run(command: Sequence[str], signals: _Signals) -> tuple[int, bool]:
    """Exit status, and whether it was ready before."""
    with _ready_pipe() as (reader, writer):
        process = subprocess.Popen(
            command,
            env={**os.environ, READY_VARIABLE: str(writer)},
            pass_fds=(writer,),
            preexec_fn=_die_with_parent,
            start_new_session=True,  # what a terminal sends to all of a group comes once, from here
        )
        signals.process = process
        if signals.stopping:  # it came while there was no process to pass it on to
            signals.forward(signal.SIGTERM)
        status = process.wait()
        status = 128 - status if status < 0 else status
        signals.process = None
        _sweep(process.pid)
        os.set_blocking(reader, False)
        try:
            was_ready = os.read(reader, 1) == b"1"
        except BlockingIOError:
            was_ready = False
        return status, was_ready


class _Signals:
    """Passes SIGINT and SIGTERM on to the process, once each; SIGKILL follows when it does not stop."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.stopping = False

    def __enter__(self) -> _Signals:
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
        return self

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forward(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGALRM:
            logger.error("the server did not stop within %.0f s: killing it", _STOP_S)
            self.forward(signal.SIGKILL)
        elif not self.stopping:
            self.stopping = True
            signal.alarm(int(_STOP_S))
            self.forward(number)


@contextmanager
def _ready_pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def _sweep(group: int) -> None:
    """End what a dead server has left, engines above all: they hold the device's memory."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _die_with_parent() -> None:
    """Linux: the kernel kills the server when its supervisor dies, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _reason(status: int) -> str:
    return f"killed by {signal.Signals(status - 128).name}" if status > 128 else f"exit status {status}"
