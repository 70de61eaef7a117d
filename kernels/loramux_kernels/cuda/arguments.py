"""Structures that kernels take as their one parameter: fields of a kind in a row, as the C++ side declares them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from loramux_kernels.cuda.scratch import MAX_SLICES

Fields = list[tuple[str, Any]]

Widths = ctypes.c_int * MAX_SLICES


def fields(*, pointers: str, int64: str, int32: str) -> Fields:
    """Device pointers, then int64s, then ints, by their names; kinds are ordered so that nothing needs padding."""
    kinds = ((pointers, ctypes.c_void_p), (int64, ctypes.c_int64), (int32, ctypes.c_int))
    return [(name, kind) for names, kind in kinds for name in names.split()]


def addresses(*tensors: Tensor) -> list[int]:
    """Device addresses."""
    return [tensor.data_ptr() for tensor in tensors]


def widths(d_outs: Sequence[int]) -> ctypes.Array[ctypes.c_int]:
    """Outputs of each slice, zeros behind them."""
    return Widths(*d_outs)
