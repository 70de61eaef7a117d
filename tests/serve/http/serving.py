"""Our routes on a plain FastAPI app, and a client that talks to it in process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from loramux.http import Services, attach
from loramux.http.error_shape import ErrorShape
from loramux.uncertainty.calibration import Calibrations
from loramux.uncertainty.recent import Recent

from ..fakes import BASE, World

ERROR_KEYS = {"message", "type", "param", "code", "hint"}


@dataclass
class Server:
    """One app and a client that talks to it in process."""

    world: World
    root: Path
    app: FastAPI
    client: httpx.AsyncClient
    stats: dict[str, int] = field(default_factory=lambda: {"capacity_bytes": 10, "used_bytes": 4})

    async def post(self, route: str, **body: Any) -> httpx.Response:
        return await self.client.post(route, json={k: str(v) if isinstance(v, Path) else v for k, v in body.items()})

    async def load(self, name: str, **more: Any) -> httpx.Response:
        return await self.post("/v1/load_lora_adapter", lora_name=name, lora_path=self.root / name, **more)


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Server]:
    """A server whose adapters lie in a folder whose name must not be seen."""
    root = folder / "adapters-of-this-host"
    root.mkdir()
    world = World(roots=(root,))
    app = FastAPI()

    # What vLLM's own server has at these paths.
    @app.get("/v1/models")
    async def core_models() -> str:
        return "core"

    @app.post("/v1/load_lora_adapter")
    async def core_load() -> str:
        return "core"

    @app.get("/v1/load_lora_adapter")
    async def other_method() -> str:
        return "other method"

    attach(app)
    app.add_middleware(ErrorShape)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
    ) as client:
        server = Server(world, root, app, client)

        async def stats() -> dict[str, int]:
            return server.stats

        app.state.loramux = Services(world.registry, BASE, 4096, stats, None, Calibrations(world.store), Recent())
        yield server


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error object of a response that must be OpenAI's, with something to do next."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == ERROR_KEYS
    assert error["code"] == code
    assert isinstance(error["message"], str)
    assert error["hint"]
    return error
