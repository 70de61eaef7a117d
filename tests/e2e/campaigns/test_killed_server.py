"""kill -9 of the real server, and of its engine: the supervisor starts it again, with the same adapters."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import run_server
from .conftest import complete, put

RESTART_S = 180


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, spare_adapters: Path) -> Iterator[Any]:
    with run_server(tmp_path_factory.mktemp("killed") / "log", "--adapter-root", str(spare_adapters)) as server:
        yield server


@pytest.mark.parametrize("victim", ["server", "engine"])
def test_it_comes_back_with_the_same_adapters(server: Any, spare_adapters: Path, victim: str) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for source in ("spare0", "spare1"):  # the second replaces the first, which is then the one to roll back to
            assert put(client, "mine", spare_adapters / source).status_code == 200
        assert client.post("/v1/adapters/mine/pin").status_code == 200
        before, answer = client.get("/v1/adapters/mine").json(), complete(client, "mine", "The lighthouse", 12)

        (process,) = _children(server.process.pid)
        os.kill(process if victim == "server" else _engine(process), signal.SIGKILL)
        _wait(client, up=False)
        _wait(client, up=True)

        after = client.get("/v1/adapters/mine").json()
        assert {key: after[key] for key in ("version", "previous", "pinned", "state")} == {
            key: before[key] for key in ("version", "previous", "pinned", "state")
        }
        assert complete(client, "mine", "The lighthouse", 12) == answer
        assert client.post("/v1/adapters/mine/rollback").status_code == 200
        assert complete(client, "mine", "The lighthouse", 12) != answer
    assert server.process.poll() is None


def _children(pid: int) -> list[int]:
    return [int(c) for task in Path(f"/proc/{pid}/task").glob("*/children") for c in task.read_text().split()]


def _engine(server: int) -> int:
    """The engine's process, by the title that vLLM gives it."""
    titles = {child: Path(f"/proc/{child}/cmdline").read_text() for child in _children(server)}
    (engine,) = (child for child, title in titles.items() if "EngineCore" in title)
    return engine


def _wait(client: httpx.Client, *, up: bool) -> None:
    deadline = time.monotonic() + RESTART_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            ready = client.get("/health/ready", timeout=5).status_code == 200
            if ready == up:
                return
            time.sleep(0.2)
            continue
        if not up:
            return
        time.sleep(0.5)
    raise AssertionError(f"not {'up' if up else 'down'} after {RESTART_S} s")
