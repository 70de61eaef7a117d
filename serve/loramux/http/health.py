"""`GET /health/ready`: may traffic be sent here? (`/health`, is the engine alive, is vLLM's own.)"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from loramux.errors import LoramuxError
from loramux.http.errors import render
from loramux.registry import State

router = APIRouter(tags=["health"])
#: The engine answers between two steps, and a step may be long; a probe gives up after a second.
_STATS_S = 0.5


class NotReady(LoramuxError):
    """Traffic should go elsewhere for now."""

    status = 503
    code = "not_ready"
    retry_after_s = 5


@router.get("/health/ready", response_model=None)
async def ready(request: Request) -> JSONResponse:
    """200 once the adapters of the start-up have settled and while the engine lives, else 503."""
    services = request.app.state.loramux
    states = Counter(adapter.current.state for adapter in services.registry.adapters().values())
    # An adapter that is loaded later does not take the server, with all others on it, out of service.
    status, memory = "ready" if services.registry.started else "loading", None
    try:
        memory = await asyncio.wait_for(services.pool_stats(), _STATS_S)
    except TimeoutError:
        pass  # busy, not broken
    except Exception:  # whatever kept the engine from answering, no request would fare better
        status = "engine_down"
    body: dict[str, Any] = {
        "status": status,
        "base": services.base,
        "adapters": {state.value: states[state] for state in State if states[state]},
        "adapter_memory": memory,
    }
    if status == "ready":
        return JSONResponse(body)
    code, shape, headers = render(NotReady(f"The server is not ready: {status}."))
    return JSONResponse(body | shape, status_code=code, headers=headers)
