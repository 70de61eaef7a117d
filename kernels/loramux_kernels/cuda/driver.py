"""Kernels on the device: load machine code and launch it, through the driver's C interface."""

from __future__ import annotations

import ctypes
import functools

import torch

from loramux_kernels.cuda.compiler import cubin

_MAX_DYNAMIC_SHARED_SIZE = 8


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


class Kernel:
    """One kernel function with one structure as its parameter, `threads` threads per block."""

    def __init__(self, function: ctypes.c_void_p, threads: int, shared: int = 0) -> None:
        self._function = function
        self._config = _Config(block=(threads, 1, 1), shared=shared)
        if shared:
            _check(_cuda().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE, shared))

    def launch(self, arguments: ctypes.Structure, blocks: int, stream: int) -> None:
        """Enqueue on the raw `stream`."""
        config = self._config
        config.grid = (blocks, 1, 1)
        config.stream = stream
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _check(_cuda().cuLaunchKernelEx(ctypes.byref(config), self._function, parameters, None))


@functools.cache
def load(name: str, device: int) -> ctypes.c_void_p:
    """The module compiled from `name` on that device, kept for the life of the process."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context current for the driver interface
        major, minor = torch.cuda.get_device_capability(device)
        module = ctypes.c_void_p()
        _check(_cuda().cuModuleLoadData(ctypes.byref(module), cubin(name, f"sm_{major}{minor}")))
        return module


@functools.cache
def kernel(source: str, op: str, dtype: torch.dtype, threads: int, device: int) -> Kernel:
    """The kernel of `op` for elements of `dtype` in `source`, with as much dynamic shared memory as the source says."""
    module, function = load(source, device), ctypes.c_void_p()
    name = f"{op}_{'bfloat16' if dtype == torch.bfloat16 else 'float16'}"
    _check(_cuda().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    return Kernel(function, threads, _constant(module, f"{name}_shared"))


def _constant(module: ctypes.c_void_p, name: str) -> int:
    """Value of an int in the module, 0 if there is none of that name."""
    address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
    if _cuda().cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module, name.encode()):
        return 0
    _check(_cuda().cuMemcpyDtoH_v2(ctypes.byref(value), address, ctypes.c_size_t(size.value)))
    return value.value


@functools.cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'error').decode()} ({status})")
