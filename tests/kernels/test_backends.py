"""Which kernels serve a GPU. No GPU is asked: what torch and NVRTC would say is said for them."""

from __future__ import annotations

import logging

import pytest
import torch

from loramux_kernels import backends
from loramux_kernels.cuda import backend, compiler

GPU = torch.device("cuda", 0)


def say(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], nvrtc: tuple[int, int] | None) -> None:
    def version() -> tuple[int, int]:
        if nvrtc is None:
            raise compiler.CompilerMissing("libnvrtc.so.13 not found; install nvidia-cuda-nvrtc")
        return nvrtc

    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(compiler, "version", version)


@pytest.mark.parametrize(
    ("capability", "nvrtc", "dtype", "name", "reason"),
    [
        ((9, 0), (13, 0), torch.bfloat16, "cuda", ""),
        ((10, 0), (13, 0), torch.float16, "cuda", ""),
        ((9, 0), (13, 0), torch.float32, "triton", ""),
        ((8, 9), (13, 0), torch.bfloat16, "triton", "8.9"),
        ((9, 0), None, torch.bfloat16, "triton", "install nvidia-cuda-nvrtc"),
    ],
)
def test_a_gpu_gets_the_fastest_kernels_it_can_run(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    nvrtc: tuple[int, int] | None,
    dtype: torch.dtype,
    name: str,
    reason: str,
) -> None:
    say(monkeypatch, capability, nvrtc)
    with caplog.at_level(logging.WARNING):
        assert backends.select(None, GPU, dtype).name == name
    assert (reason in caplog.text) and bool(caplog.records) == bool(reason)
    if reason:
        with pytest.raises(ValueError, match=reason):
            backends.select("cuda", GPU, dtype)


def test_the_cuda_kernels_do_not_run_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="cannot run on cpu"):
        backend.backend(torch.device("cpu"))
