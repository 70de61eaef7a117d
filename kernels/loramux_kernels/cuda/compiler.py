"""Source to machine code: NVRTC through its C interface, results cached on disk by content.

NVRTC and not nvcc: it is in every CUDA build of PyTorch, needs no host compiler and no toolkit headers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from importlib import metadata, resources
from pathlib import Path

import torch

from loramux_kernels.gates import CAPACITY_AT, GATE_FIELDS, GROUPS_AT, MAX_EXPERTS
from loramux_kernels.sites import TABLE_HEAD, TABLE_PART

OPTIONS = (
    "-std=c++17",
    f"-DLORAMUX_MAX_EXPERTS={MAX_EXPERTS}",
    f"-DLORAMUX_GATE_FIELDS={GATE_FIELDS}",
    f"-DLORAMUX_GATE_CAPACITY={CAPACITY_AT}",
    f"-DLORAMUX_GATE_GROUPS={GROUPS_AT}",
    f"-DLORAMUX_TABLE_HEAD={TABLE_HEAD}",
    f"-DLORAMUX_TABLE_PART={TABLE_PART}",
)
_SOURCES = "loramux_kernels.cuda.source"


class CompilerMissing(RuntimeError):
    """NVRTC is not there, or too old for the device."""


class CompileError(RuntimeError):
    """NVRTC refused our source; the message holds its log."""


def sources() -> dict[str, str]:
    """Every source file by name."""
    folder = resources.files(_SOURCES)
    return {f.name: f.read_text() for f in folder.iterdir() if f.name.endswith((".cu", ".cuh"))}


def compile_source(name: str, arch: str, *, options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """Machine code of `name` for `arch` (as sm_90a), and the compiler's log. No cache, no GPU needed.

    Raises CompilerMissing or CompileError.
    """
    nvrtc, files = _nvrtc(), sources()
    headers = {k: v for k, v in files.items() if k.endswith(".cuh")}
    program = ctypes.c_void_p()
    strings = ctypes.c_char_p * len(headers)
    _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            files[name].encode(),
            name.encode(),
            len(headers),
            strings(*(text.encode() for text in headers.values())),
            strings(*(header.encode() for header in headers)),
        ),
    )
    try:
        flags = [f"-arch={arch}", *OPTIONS, *options]
        status = nvrtc.nvrtcCompileProgram(
            program, len(flags), (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        )
        log = _read(nvrtc, program, "ProgramLog").decode(errors="replace").rstrip("\0\n")
        if status:
            raise CompileError(f"{name} for {arch}:\n{log}")
        return _read(nvrtc, program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def cubin(name: str, arch: str) -> bytes:
    """Machine code of `name` for `arch`, from the cache if it was compiled before by this NVRTC from this source."""
    folder = _cache() / "kernels"
    path = folder / f"{name}-{arch}-{_fingerprint()}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code, _ = compile_source(name, arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed when whole: another process may start at the same time.
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    except OSError:
        pass  # a cache that cannot be written only costs the next start a second
    return code


def _cache() -> Path:
    """Where loramux keeps what it builds; the rule is in its README."""
    if own := os.environ.get("LORAMUX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loramux"


@functools.cache
def version() -> tuple[int, int]:
    """Of NVRTC. CompilerMissing if there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc = _nvrtc()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def _fingerprint() -> str:
    text = repr((version(), OPTIONS, sorted(sources().items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library beside this PyTorch, or any that the loader finds."""
    version = (torch.version.cuda or "13").split(".")[0]
    names = [f"libnvrtc.so.{version}"]
    for package in ("nvidia-cuda-nvrtc", f"nvidia-cuda-nvrtc-cu{version}"):
        try:
            files = metadata.files(package) or ()
        except metadata.PackageNotFoundError:
            continue
        # Its other half is looked up by name, not beside it: found if it is loaded already.
        for prefix in ("libnvrtc-builtins.so", "libnvrtc.so"):
            names += [str(f.locate()) for f in files if f.name.startswith(prefix)]
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(library, "nvrtcCompileProgram"):
            return library
    raise CompilerMissing(
        f"libnvrtc.so.{version} not found, which CUDA builds of PyTorch bring along; "
        f"install nvidia-cuda-nvrtc, or set LORAMUX_KERNELS=triton"
    )


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompilerMissing(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")
