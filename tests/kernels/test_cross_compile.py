"""Every Triton variant that Llama-3-8B needs compiles for an H100 without a GPU, and spills no registers.

The gate of mixtures is a branch of the expand kernel, so that its registers are those of plain adapters too.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_kernels import AdapterPool, SiteSpec
from loramux_kernels.ops.shrink import PLANE_ROWS
from loramux_kernels.sites import Site, lookup

triton = pytest.importorskip("triton")

GATE_UP = SiteSpec("gate_up", ("gate", "up"), 4096, (14336, 14336))
ODD = SiteSpec("odd", ("o",), 2049, (2049,))
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
REGISTERS = 1 << 16
"""Of a multiprocessor."""
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compiled(kernel: Any, kwargs: Mapping[str, Any]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = kwargs[name]
        if name.isupper():
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={o: kwargs[o] for o in OPTIONS})


def resources(binary: Any, tmp_path: Path) -> dict[str, int]:
    """Registers and bytes of stack (where spills go) per thread, as the assembler wrote them into the binary."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}


def site_of(spec: SiteSpec, dtype: torch.dtype) -> tuple[AdapterPool, Site]:
    pool = AdapterPool(
        [spec],
        capacity_bytes=1 << 16,
        slots=8,
        max_rank=64,
        max_tokens=2048,
        max_requests=256,
        dtype=dtype,
        device="cpu",
        backend="triton",
    )
    return pool, lookup(pool.site_ids[0])


# Every class of step length for the dtype that matters, the extremes for the others.
CASES = [(GATE_UP, torch.bfloat16, tokens) for tokens in (1, 64, 256, 300, 2048)]
CASES += [(spec, dtype, t) for spec, dtype in ((GATE_UP, torch.float32), (ODD, torch.bfloat16)) for t in (1, 300)]
CASES += [(ODD, torch.float32, 300)]


@pytest.mark.parametrize(("spec", "dtype", "tokens"), CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_no_spills(spec: SiteSpec, dtype: torch.dtype, tokens: int, tmp_path: Path) -> None:
    from loramux_kernels.triton import expand, shrink

    _pool, site = site_of(spec, dtype)
    h = torch.empty(tokens + PLANE_ROWS, site.width, device="meta")
    x = torch.empty(tokens, spec.d_in, dtype=dtype, device="meta")
    y = torch.empty(tokens, sum(spec.d_outs), dtype=dtype, device="meta")
    for kernel, (_grid, kwargs) in (
        (shrink.shrink_kernel, shrink.arguments(site, x, h)),
        (expand.expand_kernel, expand.arguments(site, y, h)),
    ):
        used = resources(compiled(kernel, kwargs), tmp_path)
        assert used["STACK"] == 0, used
        if dtype == torch.bfloat16 and spec is GATE_UP:
            assert 2 * kwargs["num_warps"] * 32 * used["REG"] <= REGISTERS, "two programs must fit side by side"
