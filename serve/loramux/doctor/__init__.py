"""What would keep loramux from serving on this machine, and what to do about it.

    machine    what the checks ask of the machine; the tests have one made of lies
    finding    what a check says
    packages   versions, vLLM's hooks, packages that break others, folders that hide them
    hardware   compiler and libraries, memory, GPU, disk
    server     the port, and who answers there

A check is a function from a Machine to findings, listed in `CHECKS`. None may raise, wait for long, or import what may
be broken: that happens in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loramux.doctor import hardware, packages, server
from loramux.doctor.finding import Finding, Level
from loramux.doctor.machine import Machine

Check = Callable[[Machine], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    packages.python,
    packages.requirements,
    packages.vllm,
    packages.hooks,
    packages.companions,
    packages.shadows,
    hardware.native,
    hardware.gpu,
    hardware.memory,
    hardware.cache,
    hardware.models,
    server.port,
)


def examine(machine: Machine, checks: tuple[Check, ...] = CHECKS) -> Iterator[Finding]:
    """Every finding, as it is made. A check that breaks is itself a finding."""
    for check in checks:
        try:
            yield from check(machine)
        except Exception as error:  # a doctor who faints helps nobody
            yield Finding.warn(check.__name__, f"this check failed: {type(error).__name__}: {error}", "Report it.")


__all__ = ["CHECKS", "Check", "Finding", "Level", "Machine", "examine"]
