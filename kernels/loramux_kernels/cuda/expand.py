"""Launch of source/expand_decode.cu and source/expand_prefill.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from loramux_kernels.cuda.arguments import Widths, addresses, fields, widths
from loramux_kernels.cuda.driver import Kernel, kernel
from loramux_kernels.cuda.overlap import fork
from loramux_kernels.cuda.scratch import scratch
from loramux_kernels.plan import SMALL_STEP
from loramux_kernels.sites import Site
from loramux_kernels.trace import TRACE_TOKENS

_THREADS, _COLUMNS = 128, 64
"""Threads of a block; outputs of one step of a warp."""
_DECODE_BLOCKS, _PREFILL_BLOCKS = 396, 264
"""Thread blocks at most: as many as 132 multiprocessors hold at once."""


class _Decode(ctypes.Structure):
    _fields_ = (
        *fields(
            pointers="weights floats count handoff left y",
            int64="y_stride",
            int32="slices",
        ),
        ("widths", Widths),
    )


class _Prefill(ctypes.Structure):
    _fields_ = (
        *fields(
            pointers="h weights floats ints table count tiles token_ids y trace flag places counts",
            int64="h_stride table_stride y_stride",
            int32="first_gate traced slices",
        ),
        ("widths", Widths),
    )


def _kernel(site: Site, step: str) -> Kernel:
    return kernel(f"expand_{step}.cu", "expand", site.dtype, _THREADS, site.weights.device.index)


def expand(site: Site, y: Tensor, h: Tensor) -> None:
    """Add to the rows of y whose tokens have an adapter at this site, from what this backend's shrink left."""
    tokens = y.shape[0]
    if not tokens:
        return
    tiles = site.plan.tiles(tokens)
    slices, steps = len(site.spec.d_outs), tiles.programs * sum(-(-d // _COLUMNS) for d in site.spec.d_outs)
    stream = torch.cuda.current_stream(y.device)
    if tokens > SMALL_STEP:
        prefill = _Prefill(
            *addresses(h, site.weights, site.floats, site.ints, site.table, tiles.number, tiles.tiles, tiles.tokens),
            *addresses(y, site.trace.buffer, site.trace.flag, site.plan.sequences.buffer, site.ints),
            h.stride(0),
            site.table.stride(0),
            y.stride(0),
            site.first_gate,
            TRACE_TOKENS,
            slices,
            widths(site.spec.d_outs),
        )
        _kernel(site, "prefill").launch(prefill, min(steps, _PREFILL_BLOCKS), stream.cuda_stream)
        return
    room = scratch(site.plan, y.device)
    decode = _Decode(
        *addresses(site.weights, site.floats, tiles.number, room.handoff, room.left, y),
        y.stride(0),
        slices,
        widths(site.spec.d_outs),
    )
    fork(y.device.index).join(stream)
    _kernel(site, "decode").launch(decode, min(steps, _DECODE_BLOCKS), stream.cuda_stream)


def warmup(site: Site) -> None:
    """Compile and load what this site's steps will launch."""
    _kernel(site, "decode")
    _kernel(site, "prefill")
