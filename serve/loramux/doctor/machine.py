"""What the checks ask of the machine, in one place, so that a test can answer instead."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Ran:
    """A finished process; `status` is None if it did not end in time or is not there."""

    status: int | None
    out: str = ""
    err: str = ""

    @property
    def last_line(self) -> str:
        """The last thing it complained about: of a traceback, the exception."""
        lines = self.err.strip().splitlines()
        return lines[-1].strip() if lines else f"exit status {self.status}"


@dataclass(frozen=True)
class Machine:
    """This machine. `url` is the server's address, `key` what it is asked with."""

    url: str
    key: str | None = None

    @property
    def python(self) -> tuple[int, ...]:
        return sys.version_info[:3]

    def version(self, distribution: str) -> str | None:
        """Of an installed distribution."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def requirements(self) -> list[str]:
        """What loramux itself needs; empty in a checkout that is not installed."""
        try:
            return importlib.metadata.requires("loramux") or []
        except importlib.metadata.PackageNotFoundError:
            return []

    def path(self) -> list[Path]:
        """Where `import` looks: the current folder first, as for `python -m loramux` and `python -c`."""
        return [Path.cwd(), *(Path(entry) for entry in sys.path if entry)]

    def site_packages(self) -> set[Path]:
        """Where pip installs to: packages there have every right to their names."""
        return {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}

    def run(self, command: Sequence[str], *, timeout_s: float) -> Ran:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return Ran(None, err=f"it did not end within {timeout_s:.0f} s")
        except OSError as error:
            return Ran(None, err=str(error))
        return Ran(done.returncode, done.stdout, done.stderr)

    def run_python(self, code: str, *, timeout_s: float = 120) -> Ran:
        """In a fresh interpreter: what breaks there, breaks nothing here."""
        return self.run([sys.executable, "-c", code], timeout_s=timeout_s)

    def which(self, program: str) -> str | None:
        return shutil.which(program)

    def has_library(self, name: str) -> bool:
        """Can the loader find it?"""
        try:
            ctypes.CDLL(name)
        except OSError:
            return False
        return True

    def has_headers(self) -> bool:
        """Python's own, for what is compiled against it."""
        return Path(sysconfig.get_path("include"), "Python.h").is_file()

    def memory(self) -> tuple[int, int]:
        """Bytes of RAM, available and total: of the container if it is limited, else of the machine."""
        total, available = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
        )
        for line in _read(Path("/proc/meminfo")).splitlines():
            if line.startswith("MemAvailable:"):  # counts caches that can be dropped, unlike sysconf
                available = int(line.split()[1]) * 1024
        limit, used = (_read(_CGROUP / f"memory.{name}").strip() for name in ("max", "current"))
        if limit.isdigit() and used.isdigit():
            total = min(total, int(limit))
            available = min(available, max(0, int(limit) - int(used)))
        return available, total

    def writable(self, folder: Path) -> bool:
        """Can `folder`, or the first of its parents that exists, be written to?"""
        place = _existing(folder)
        return place.is_dir() and os.access(place, os.W_OK | os.X_OK)

    def free_disk(self, folder: Path) -> int:
        """Bytes left where `folder` is or would be."""
        return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
