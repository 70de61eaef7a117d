from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

from loramux_kernels.backends import Backend
from loramux_kernels.cuda import backend as cuda_backend
from loramux_kernels.cuda import expand as cuda_expand
from loramux_kernels.cuda import shrink as cuda_shrink

from .driver import Emulator


class _Fork:
    """In the place of `overlap.Fork`: the shrink ends before the base linear begins."""

    @contextmanager
    def beside(self, stream: object) -> Iterator[int]:
        yield 0

    def join(self, stream: object) -> None: ...


class _Stream:
    cuda_stream = 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The references' products are small: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, one_thread: None) -> Emulator:
    """The cuda backend on CPU tensors: everything but the driver is the real one."""
    if shutil.which("g++") is None:
        if os.environ.get("LORAMUX_CI"):
            pytest.fail("no g++")
        pytest.skip("no g++")
    made = Emulator(pytestconfig.cache.mkdir("emulated"))
    for module in (cuda_shrink, cuda_expand):
        monkeypatch.setattr(module, "kernel", made.kernel)
        monkeypatch.setattr(module, "fork", lambda device: _Fork())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream())
    functions = (cuda_backend._shrink, cuda_backend._expand, cuda_backend._warmup, cuda_backend._overhead)
    monkeypatch.setattr(cuda_backend, "backend", lambda device: Backend("cuda", *functions))
    return made
