"""Tensors that end where the memory of the process ends: whoever reads or writes beyond one is caught."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PAGE = mmap.PAGESIZE
_ALIGNMENT = 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def empty(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A tensor of NaN (−1 if of integers) between two pages that nobody may touch."""
    shape = tuple(shape)
    size = torch.Size(shape).numel() * dtype.itemsize
    inner = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, inner + 2 * _PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + _PAGE + inner):
        if _libc.mprotect(page, _PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    if not size:
        return torch.empty(shape, dtype=dtype)
    offset = _PAGE + inner - -(-size // _ALIGNMENT) * _ALIGNMENT
    tensor = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)
    return tensor.fill_(255).view(dtype).view(shape)


def like(tensor: Tensor) -> Tensor:
    """A copy of a contiguous tensor."""
    return empty(tensor.shape, tensor.dtype).copy_(tensor)


class Guarded(TorchFunctionMode):
    """What `torch.empty`, `zeros` and `full` return inside is guarded."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.empty:
            return empty(made.shape, made.dtype)
        return like(made) if func in (torch.zeros, torch.full) else made
