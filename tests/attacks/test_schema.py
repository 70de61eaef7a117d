"""What our routes promise in /openapi.json, tried by schemathesis: no request makes a 5xx, whatever it holds."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from ..serve.http.serving import serving

CONTENTS = ("a", "b", "c")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("schema")


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    """Our routes over a registry with fakes around it, behind a real socket: schemathesis calls from threads."""
    listening, ends = threading.Event(), threading.Event()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def run() -> None:
        async with serving(root) as server:
            await server.world.registry.start({})
            uv = uvicorn.Server(uvicorn.Config(server.app, port=port, log_level="critical", lifespan="off"))
            task = asyncio.create_task(uv.serve())
            while not uv.started:
                await asyncio.sleep(0.01)
            listening.set()
            await asyncio.to_thread(ends.wait)
            uv.should_exit = True
            await task

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert listening.wait(20)
    yield f"http://127.0.0.1:{port}"
    ends.set()
    thread.join()


def test_no_request_makes_a_5xx(url: str, root: Path) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json").exclude(path_regex=r"^/$")  # the page
    tried = []
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(), content=st.sampled_from([*CONTENTS, None]))
        def attempt(case: Any, content: str | None) -> None:
            if isinstance(case.body, dict) and content is not None:
                # Mostly sources that are allowed: others never get past the first check.
                for field in case.body.keys() & {"source", "lora_path"}:
                    case.body[field] = str(next(root.iterdir()) / content)
            case.call_and_validate(checks=[not_a_server_error])

        attempt()
        tried.append(operation.label)
    assert len(tried) >= 12, tried


def test_all_our_routes_are_in_it(url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert {
        "/v1/models",
        "/v1/adapters",
        "/v1/adapters/{name}",
        "/v1/adapters/{name}/rollback",
        "/v1/adapters/{name}/pin",
        "/v1/load_lora_adapter",
        "/health/ready",
    } <= set(paths)
