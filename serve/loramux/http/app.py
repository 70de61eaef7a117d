"""Put loramux on an app: routes, error shape, request ids."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from loramux.errors import LoramuxError
from loramux.http import adapters, calibrations, feedback, health, models, page, vllm_adapters
from loramux.http.errors import render
from loramux.registry import AdapterRegistry
from loramux.uncertainty.calibration import Calibrations
from loramux.uncertainty.recent import Recent


@dataclass
class Services:
    """What the routes work on; lives at `app.state.loramux`."""

    registry: AdapterRegistry
    base: str
    max_model_len: int
    pool_stats: Callable[[], Awaitable[dict[str, int]]]
    tokenizer: Any  # the base model's, of Hugging Face's kind
    calibrations: Calibrations
    recent: Recent


def attach(app: FastAPI) -> None:
    """Add our routes to `app`, in place of routes it already has for the same path and method."""
    modules = (models, adapters, calibrations, feedback, vllm_adapters, health, page)
    routers = [module.router for module in modules]
    ours = [route for router in routers for route in router.routes]
    taken = {(getattr(route, "path", None), method) for route in ours for method in getattr(route, "methods", ())}
    # vLLM 0.26 appends a plugin's routes, so its own would win; 0.32 replaces them itself.
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if not any((getattr(route, "path", None), method) in taken for method in getattr(route, "methods", None) or ())
    ]
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(LoramuxError, _answer)


async def _answer(_: Request, error: Any) -> JSONResponse:
    status, body, headers = render(error)
    return JSONResponse(body, status_code=status, headers=headers)
