"""A thousand adapters in a folder: the server is ready about as soon as without them, and any of them answers."""

from __future__ import annotations

import random
import time
from pathlib import Path

import httpx
import pytest

from ..conftest import run_server
from .conftest import MakeAdapter, complete

ADAPTERS = 1000
BEYOND_BASE_S = 60
METRICS_BYTES = 2_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_adapter: MakeAdapter) -> Path:
    folder = tmp_path_factory.mktemp("thousand")
    for i in range(ADAPTERS):
        make_adapter(folder / f"a{i:03}", seed=i, rank=4)
    return folder


def test_a_thousand_adapters(folder: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with run_server(tmp_path / "base"):
        alone = time.monotonic() - began
    began = time.monotonic()
    with run_server(tmp_path / "log", "--adapters", str(folder)) as server:
        beyond = time.monotonic() - began - alone
        assert beyond < BEYOND_BASE_S, f"ready {beyond:.0f} s after the base alone ({alone:.0f} s)"
        with httpx.Client(base_url=server.url, timeout=120) as client:
            names = [f"a{i:03}" for i in random.Random(0).sample(range(ADAPTERS), 18)]
            answers = {name: complete(client, name, "The lighthouse", 8) for name in ("a000", "a999", *names)}
            assert len(set(answers.values())) > 10, "adapters of their own, not the base under many names"
            assert len(client.get("/v1/models").json()["data"]) == ADAPTERS + 1
            metrics = client.get("/metrics").content
            assert len(metrics) < METRICS_BYTES, f"{len(metrics)} bytes of metrics"
