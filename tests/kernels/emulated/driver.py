"""The kernels' sources as host code, in place of loramux_kernels.cuda.driver: compiled by g++, run by machine.cpp."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from loramux_kernels.cuda import compiler

_HERE = Path(__file__).parent
_FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fPIC"),
    # What has one name in several sources is not the same.
    *("-fno-gnu-unique", "-Wl,-Bsymbolic"),
    *("-ffp-contract=off", "-U_FORTIFY_SOURCE"),
)
_KERNEL_FLAGS = ("-fsanitize=thread,undefined", "-fsanitize-undefined-trap-on-error")
"""The calls of a thread sanitizer, which memory.cpp defines, and a trap at undefined behaviour."""
_MACHINE = ("machine.cpp", "memory.cpp")


_OURS = {path.name: path.read_text() for path in _HERE.iterdir() if path.suffix in (".cpp", ".hpp", ".cuh")}


class EmulatedError(AssertionError):
    """What a kernel did that a GPU would not have borne, or might not have."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("seed", ctypes.c_ulonglong),
    )


class Emulator:
    """Sources by name, compiled into `cache`. `seed` decides who runs when; it changes from launch to launch.

    `blocks`, if any, is the most that a launch gets: fewer than it asks for.
    """

    def __init__(self, cache: Path, sources: dict[str, str] | None = None) -> None:
        self._cache = cache
        self.sources = sources if sources is not None else compiler.sources()
        self._libraries: dict[str, Path] = {}
        self.seeds = itertools.count(1)
        self.blocks: int | None = None
        self.launches: list[str] = []

    def kernel(self, source: str, op: str, dtype: torch.dtype, threads: int, device: int | None) -> Kernel:
        """In the place of `driver.kernel`."""
        if source not in self._libraries:
            self._libraries[source] = _library(self._cache, source, op, self.sources)
        name = f"{op}_{'bfloat16' if dtype == torch.bfloat16 else 'float16'}"
        return Kernel(self, self._libraries[source], name, threads)


class Kernel:
    """In the place of `driver.Kernel`."""

    def __init__(self, emulator: Emulator, library: Path, name: str, threads: int) -> None:
        self._emulator, self._library, self._name, self._threads = emulator, library, name, threads

    def launch(self, arguments: ctypes.Structure, blocks: int, stream: int) -> None:
        """Run to the end. EmulatedError if it cannot, or may not."""
        library = _load(self._library)
        try:
            shared = ctypes.c_int.in_dll(library, f"{self._name}_shared").value
        except ValueError:
            shared = 0
        emulator = self._emulator
        emulator.launches.append(self._name)
        launch = _Launch(min(blocks, emulator.blocks or blocks), self._threads, shared, next(emulator.seeds))
        run = getattr(library, f"run_{self._name}")
        run.restype = ctypes.c_char_p
        wrong = run(ctypes.byref(arguments), ctypes.byref(launch))
        if wrong is not None:
            raise EmulatedError(_with_lines(wrong.decode(), self._library))


@functools.cache
def _load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _library(cache: Path, source: str, op: str, sources: dict[str, str]) -> Path:
    """The library of one source, built if no such one was built before."""
    files = {name: text for name, text in sources.items() if name == source or name.endswith(".cuh")} | _OURS
    defines = [option for option in compiler.OPTIONS if option.startswith("-D")]
    flags = [*_FLAGS, *defines, f'-DSOURCE="{source}"', f"-DOP={op}"]
    text = repr((sorted(files.items()), flags, _KERNEL_FLAGS))
    folder = cache / f"{source}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    library = folder / "library.so"
    if library.exists():
        return library
    # Built beside it and renamed when whole: another test process may build the same.
    with tempfile.TemporaryDirectory(dir=cache) as building:
        made = Path(building) / folder.name
        made.mkdir()
        for name, content in files.items():
            (made / name).write_text(content)
        _run("g++", *flags, *_KERNEL_FLAGS, "-c", "kernel.cpp", "-o", "kernel.o", folder=made)
        _run("g++", *flags, "-shared", "kernel.o", *_MACHINE, "-o", library.name, "-ldl", folder=made)
        try:
            made.rename(folder)
        except OSError:
            if not library.exists():
                raise
    return library


def _run(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulatedError(f"{' '.join(command)}\n{done.stderr}")


def _with_lines(text: str, library: Path) -> str:
    """The message with file and line in the place of addresses: of the kernel's own code, not of what stands in."""

    def line(match: re.Match[str]) -> str:
        command = ("addr2line", "-i", "-e", str(library), match[1])
        try:
            frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
        except (OSError, subprocess.CalledProcessError):
            return match[0]
        named = [frame.split()[0].rsplit("/", 1)[-1] for frame in frames if frame]
        return next((name for name in named if name.split(":")[0] not in _OURS), named[0])

    return re.sub(r"\{\+(0x[0-9a-f]+)\}", line, text)
