"""`/v1/adapters`: adapters as resources, versioned by the digest of their content."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from loramux.config import ADAPTER_NAME
from loramux.http.cards import adapter_card, removed_card, visible
from loramux.http.conditions import condition, etag
from loramux.plan import SLOTS
from loramux.registry import Adapter

router = APIRouter(tags=["adapters"])

#: Of a name that is to be given; a name that exists is looked up as it is.
NAME_PATTERN = f"^{ADAPTER_NAME.pattern}$"
_WAIT_S = 30.0


class PutAdapter(BaseModel):
    """What a name is to mean."""

    model_config = ConfigDict(extra="forbid")

    source: Path = Field(description="Folder or native file under an --adapter-root.")
    pinned: StrictBool | None = Field(None, description="Exempt from eviction; left as it is if not given.")


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> dict[str, Any]:
    """Every adapter the caller may use, and the memory they share."""
    services = request.app.state.loramux
    registry = services.registry
    return {
        "object": "list",
        "data": [
            adapter_card(adapter, services.calibrations)
            for name, adapter in registry.adapters().items()
            if visible(request, name)
        ],
        "memory": {
            "capacity_bytes": registry.capacity_bytes,
            "used_bytes": registry.resident_bytes(),
            "resident": registry.resident_count(),
            "slots": SLOTS,
        },
    }


@router.get("/v1/adapters/{name:path}", response_model=None)
async def get_adapter(name: str, request: Request) -> JSONResponse:
    """One adapter; its version is also the ETag."""
    return _answer(request, request.app.state.loramux.registry.adapter(name))


@router.put("/v1/adapters/{name:path}", response_model=None)
async def put_adapter(
    name: Annotated[str, InPath(pattern=NAME_PATTERN)],
    body: PutAdapter,
    request: Request,
    wait: Annotated[float, Query(ge=0, le=3600, description="Seconds to wait until it is ready.")] = _WAIT_S,
) -> JSONResponse:
    """Let the name mean what the source holds. 200: ready to serve. 202: accepted, still on its way.

    The version before it serves until the new one is ready, and on if the new one is refused. The same content
    again changes nothing.
    """
    registry = request.app.state.loramux.registry
    loop = asyncio.get_running_loop()
    until = loop.time() + wait
    source = registry.check_source(body.source)
    change = await registry.put(name, source, pinned=body.pinned, condition=condition(request), turn_s=wait)
    # Not awaited itself: a client that leaves does not stop it.
    await asyncio.wait({change}, timeout=max(0.0, until - loop.time()))
    if change.done():
        return _answer(request, change.result())
    return _answer(request, registry.adapter(name), status=202)


@router.delete("/v1/adapters/{name:path}", response_model=None)
async def delete_adapter(name: str, request: Request) -> JSONResponse:
    """Withdraw the name now; the memory is freed when its last running request ends."""
    adapter = await request.app.state.loramux.registry.delete(name, condition=condition(request))
    return JSONResponse(removed_card(adapter, request.app.state.loramux.calibrations))


@router.post("/v1/adapters/{name:path}/rollback", response_model=None)
async def roll_back_adapter(name: str, request: Request) -> JSONResponse:
    """Let the previous version serve again; it and the current one change places."""
    return _answer(request, await request.app.state.loramux.registry.rollback(name, condition=condition(request)))


@router.post("/v1/adapters/{name:path}/pin", response_model=None)
async def pin_adapter(name: str, request: Request) -> JSONResponse:
    """Load the adapter, and exempt it from eviction."""
    return _answer(request, await request.app.state.loramux.registry.pin(name))


@router.post("/v1/adapters/{name:path}/unpin", response_model=None)
async def unpin_adapter(name: str, request: Request) -> JSONResponse:
    """Let the adapter be evicted when others need its memory."""
    return _answer(request, await request.app.state.loramux.registry.pin(name, pinned=False))


def _answer(request: Request, adapter: Adapter, status: int = 200) -> JSONResponse:
    card = adapter_card(adapter, request.app.state.loramux.calibrations)
    return JSONResponse(card, status_code=status, headers=etag(adapter))
