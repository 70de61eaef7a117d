"""Which implementation runs a pool's ops.

A backend asked for by name fails loudly when it cannot run; `auto` takes the one made for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loramux_kernels.plan import Plan
    from loramux_kernels.sites import Site

BACKEND_VARIABLE = "LORAMUX_KERNELS"
NAMES = ("auto", "reference", "cpu", "triton")


@dataclass(frozen=True)
class Backend:
    """Functions of one backend. `tiled`: it reads tiles and tables in device memory, not host views."""

    name: str
    shrink: Callable[[Site, Tensor, Tensor], None]
    expand: Callable[[Site, Tensor, Tensor], None]
    warmup: Callable[[Sequence[Site], Plan], None] | None = None

    @property
    def tiled(self) -> bool:
        return self.name == "triton"


def select(requested: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend `requested` by name, else by the environment variable LORAMUX_KERNELS, else the device's own."""
    name = requested or os.environ.get(BACKEND_VARIABLE) or "auto"
    if name not in NAMES:
        raise ValueError(f'no kernel backend "{name}" (argument or {BACKEND_VARIABLE}); there are {", ".join(NAMES)}')
    if name == "auto":
        name = "triton" if device.type == "cuda" else "cpu"
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"the cpu backend cannot run on {device}")
    if name == "triton":
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"the triton backend has no {dtype}; the reference backend has")
        from loramux_kernels.triton import expand as t_expand
        from loramux_kernels.triton import shrink as t_shrink
        from loramux_kernels.triton import warmup as t_warmup

        return Backend(name, t_shrink.shrink, t_expand.expand, t_warmup.warmup)
    if name == "cpu":
        from loramux_kernels.cpu import expand as c_expand
        from loramux_kernels.cpu import shrink as c_shrink

        return Backend(name, c_shrink.shrink, c_expand.expand)
    from loramux_kernels.reference import expand as r_expand
    from loramux_kernels.reference import shrink as r_shrink

    return Backend(name, r_shrink.shrink, r_expand.expand)
