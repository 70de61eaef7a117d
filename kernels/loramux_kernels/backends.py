"""Which implementation runs a pool's ops.

A backend asked for by name fails loudly when it cannot run; `auto` takes the one made for the device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loramux_kernels.plan import Plan
    from loramux_kernels.sites import Site

_log = logging.getLogger(__name__)

BACKEND_VARIABLE = "LORAMUX_KERNELS"
NAMES = ("auto", "reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Backend:
    """Functions of one backend. `tiled`: it reads tiles and tables in device memory, not host views. `overhead`: bytes
    of its own device memory for a pool with that plan."""

    name: str
    shrink: Callable[[Site, Tensor, Tensor], None]
    expand: Callable[[Site, Tensor, Tensor], None]
    warmup: Callable[[Sequence[Site], Plan], None] | None = None
    overhead: Callable[[Plan, torch.device], int] | None = None

    @property
    def tiled(self) -> bool:
        return self.name in ("triton", "cuda")


def select(requested: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend `requested` by name, else by the environment variable LORAMUX_KERNELS, else the device's own."""
    name = requested or os.environ.get(BACKEND_VARIABLE) or "auto"
    if name not in NAMES:
        raise ValueError(f'no kernel backend "{name}" (argument or {BACKEND_VARIABLE}); there are {", ".join(NAMES)}')
    if name == "auto":
        name = _of_device(device, dtype)
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"the cpu backend cannot run on {device}")
    if name == "cuda":
        from loramux_kernels.cuda import backend

        return backend.backend(device)
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


def _of_device(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return "cpu"
    if dtype not in (torch.bfloat16, torch.float16):
        return "triton"
    from loramux_kernels.cuda import backend

    reason = backend.unusable(device)
    if reason is None:
        return "cuda"
    _log.warning("the Triton kernels serve this device, which is slower: %s", reason)
    return "triton"
