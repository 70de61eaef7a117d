"""Launch of source/shrink_decode.cu and source/shrink_prefill.cu."""

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

_THREADS = 256
_ROWS, _PIECE, _PLANES = 16, 2048, 4
"""Of a decode step: rows of A of a unit, inputs that a block's loads cover in one round, and pieces of I at most:
T·planes ≤ T + PLANE_ROWS for T ≤ SMALL_STEP."""
_BLOCKS = 96
"""Thread blocks of a decode step at most: a base linear beside them does without the multiprocessors that they hold."""
_CLUSTER, _CLUSTERS, _GROUP_ROWS = 8, 64, 128
"""Of a prefill step: blocks of a cluster, clusters at most, rows of A that one takes at a time."""


class _Decode(ctypes.Structure):
    _fields_ = (
        *fields(
            pointers="x weights floats ints table count tiles token_ids h handoff left finished trace flag "
            "places counts",
            int64="x_stride table_stride h_stride plane_stride",
            int32="d_in planes first_gate traced slices",
        ),
        ("widths", Widths),
    )


class _Prefill(ctypes.Structure):
    _fields_ = (
        *fields(
            pointers="x weights table count tiles token_ids h",
            int64="x_stride table_stride h_stride",
            int32="d_in groups",
        ),
    )


def _kernel(site: Site, step: str) -> Kernel:
    return kernel(f"shrink_{step}.cu", "shrink", site.dtype, _THREADS, site.weights.device.index)


def shrink(site: Site, x: Tensor, h: Tensor) -> None:
    """h of the rows of x whose tokens have an adapter at this site, in a form that only this backend's expand reads.

    A decode step's shrink runs beside what is enqueued next on the current stream, until the expand.
    """
    tokens, d_in = x.shape
    if not tokens:
        return
    tiles = site.plan.tiles(tokens)
    stream = torch.cuda.current_stream(x.device)
    if tokens > SMALL_STEP:
        groups = -(-site.rows // _GROUP_ROWS)
        prefill = _Prefill(
            *addresses(x, site.weights, site.table, tiles.number, tiles.tiles, tiles.tokens, h),
            x.stride(0),
            site.table.stride(0),
            h.stride(0),
            d_in,
            groups,
        )
        clusters = min(tiles.programs * groups, _CLUSTERS)
        _kernel(site, "prefill").launch(prefill, clusters * _CLUSTER, stream.cuda_stream)
        return
    room = scratch(site.plan, x.device)
    decode = _Decode(
        *addresses(x, site.weights, site.floats, site.ints, site.table, tiles.number, tiles.tiles, tiles.tokens),
        *addresses(h, room.handoff, room.left, room.finished, site.trace.buffer, site.trace.flag),
        *addresses(site.plan.sequences.buffer, site.ints),
        x.stride(0),
        site.table.stride(0),
        h.stride(0),
        h.stride(0) * tokens,
        d_in,
        # The same for every step, so that a sum's order never depends on the batch.
        min(-(-d_in // _PIECE), _PLANES),
        site.first_gate,
        TRACE_TOKENS,
        len(site.spec.d_outs),
        widths(site.spec.d_outs),
    )
    blocks = min(tiles.programs * -(-site.rows // _ROWS) * decode.planes, _BLOCKS)
    with fork(x.device.index).beside(stream) as side:
        _kernel(site, "decode").launch(decode, blocks, side)


def warmup(site: Site) -> None:
    """Compile and load what this site's steps will launch, and make room."""
    _kernel(site, "decode")
    _kernel(site, "prefill")
    scratch(site.plan, site.weights.device)
