"""The stager's process: `python -m loramux.staging CONNECTION BUFFER SETUP`, open file descriptors all three."""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from loramux.staging.buffer import StagingBuffer
from loramux.staging.messages import Setup
from loramux.staging.stager import Stager


def main(connection: int, buffer: int, setup: int) -> None:
    with suppress(OSError, AttributeError):
        os.nice(5)  # where cores are few, steps come first,
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # and are not interrupted to read a message
    torch.set_num_threads(1)
    with os.fdopen(setup, "rb") as file:
        file.seek(0)  # it is the engine's descriptor, which has written
        made_for: Setup = pickle.load(file)
    memory = StagingBuffer(buffer, made_for.piece_bytes, made_for.pieces)
    Stager(Connection(connection), memory, made_for).run()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
