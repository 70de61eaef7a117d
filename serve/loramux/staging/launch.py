"""Starting the stager's process: where it runs, and what it is told of the engine's environment."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection

from loramux.staging.buffer import StagingBuffer
from loramux.staging.messages import Setup

BINDING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
"""Of a process that has one of these, OpenMP's runtime binds the first thread, as soon as the runtime is loaded."""
_PASSED_ON = ("HOME", "LANG", "LC_", "LD_", "PATH", "PYTHON", "TMPDIR", "TZ")
"""What an interpreter may need to start: names, and beginnings of names."""


def launch_process(theirs: Connection, buffer: StagingBuffer, setup: Setup) -> Callable[[], object]:
    """A new interpreter: a fork would share the engine's CUDA context, and engines may not have children of
    multiprocessing's kind. Returns what ends it; raises OSError."""
    handle = os.memfd_create("loramux-staging-setup")
    try:
        with os.fdopen(handle, "wb", closefd=False) as file:
            pickle.dump(setup, file)
        handles = (theirs.fileno(), buffer.handle, handle)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "loramux.staging", *map(str, handles)],
            pass_fds=handles,
            stdin=subprocess.DEVNULL,
            env=environment(os.environ),
            # Signals for the server's group are for the engine, which then closes its end. Not a session: Linux
            # shares a core between sessions first, and what is nice is so to its own.
            process_group=0,
        )
    finally:
        os.close(handle)
    with suppress(OSError):  # it has ended already
        os.sched_setaffinity(process.pid, cores(os.environ))

    def end() -> None:
        process.kill()
        process.wait()

    return end


def environment(engines: Mapping[str, str]) -> dict[str, str]:
    """The stager's. Above all nothing for OpenMP: a CPU engine's says to bind to the core that its steps keep busy."""
    return {name: value for name, value in engines.items() if name.startswith(_PASSED_ON)} | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        # Copies, conversions, no device: a core is enough, and the engine's cores are not to be taken from it.
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def cores(engines: Mapping[str, str]) -> set[int]:
    """Where the stager may run: where the engine may, and if that was bound by OpenMP, where its parent may."""
    allowed = os.sched_getaffinity(0)
    if any(name in engines for name in BINDING):
        allowed |= os.sched_getaffinity(os.getppid())
    return allowed
