"""A stager in a thread of the test: the code of its process, without the seconds that a new interpreter takes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from loramux.staging import Setup
from loramux.staging.buffer import StagingBuffer
from loramux.staging.stager import Stager


def launch_thread(
    theirs: Connection, buffer: StagingBuffer, setup: Setup, *, messages: int | None = None
) -> Callable[[], object]:
    """`messages`: it dies when it has sent so many."""
    connection = _Limited(os.dup(theirs.fileno()), messages)

    def run() -> None:
        with connection:
            Stager(connection, buffer, setup).run()

    thread = threading.Thread(target=run)
    thread.start()
    return thread.join


class _Limited(Connection):
    def __init__(self, handle: int, messages: int | None) -> None:
        super().__init__(handle)
        self._left = messages

    def send(self, obj: Any) -> None:
        if self._left == 0:
            raise BrokenPipeError
        super().send(obj)
        if self._left is not None:
            self._left -= 1
