"""Every CUDA source compiles for Hopper without spilling a register. NVRTC needs no GPU for that."""

from __future__ import annotations

import os
import re

import pytest

from loramux_kernels.cuda import compiler

KERNELS = sorted(name for name in compiler.sources() if name.endswith(".cu"))
REGISTERS = 65536
"""Of a multiprocessor."""
BESIDE = {"shrink_prefill.cu": 2}
"""Blocks side by side that launch bounds do not ask for: with them this kernel would spill, without it has room."""


@pytest.fixture(scope="module", autouse=True)
def nvrtc() -> None:
    try:
        compiler.version()
    except compiler.CompilerMissing as missing:
        if os.environ.get("LORAMUX_CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


def test_all_kernels_are_there() -> None:
    assert [f"{op}_{step}.cu" for op in ("expand", "shrink") for step in ("decode", "prefill")] == KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_and_as_many_blocks_as_promised(name: str) -> None:
    code, log = compiler.compile_source(name, "sm_90", options=("--ptxas-options=-v",))
    assert code.startswith(b"\x7fELF")
    source = compiler.sources()[name]
    threads = 32 * int(re.search(r"WARPS = (\d+)", source)[1])  # type: ignore[index]
    blocks = re.search(r"__launch_bounds__\(loramux::THREADS, (\d+)\)", source)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    assert len(registers) == 2, "one kernel each for bfloat16 and float16"
    assert len(frames) in (2, 4), "and at most one function beside each"
    assert set(frames) == {("0", "0", "0")}
    for used in map(int, registers):
        assert used * threads * (int(blocks[1]) if blocks else BESIDE.get(name, 1)) <= REGISTERS


def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(compiler.CompileError, match=r"shrink_decode\.cu for sm_90"):
        compiler.compile_source("shrink_decode.cu", "sm_90", options=("-DMMA_ROWS=+",))


def test_the_cache_is_by_content(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path))
    code = compiler.cubin("expand_decode.cu", "sm_90")
    monkeypatch.setattr(compiler, "compile_source", lambda *_, **__: pytest.fail("compiled again"))
    assert compiler.cubin("expand_decode.cu", "sm_90") == code
