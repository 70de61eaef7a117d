"""`GET /v1/models`: the base and its adapters, in OpenAI's shape with an `adapter` object."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from loramux.registry import AdapterEntry

router = APIRouter(tags=["models"])
_STARTED = int(time.time())


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The base model first, then every adapter with its state."""
    services = request.app.state.loramux
    cards = [base_card(services.base, services.max_model_len)]
    cards += [
        adapter_card(entry, services.base, services.max_model_len) for entry in services.registry.entries().values()
    ]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    """One card. 404 `model_not_found` names close matches."""
    services = request.app.state.loramux
    if name == services.base:
        return base_card(services.base, services.max_model_len)
    entry = services.registry.entries().get(name)
    if entry is None:
        raise services.registry.not_found(name)
    return adapter_card(entry, services.base, services.max_model_len)


def base_card(base: str, max_model_len: int) -> dict[str, Any]:
    return {
        "id": base,
        "object": "model",
        "created": _STARTED,
        "owned_by": "loramux",
        "root": base,
        "parent": None,
        "max_model_len": max_model_len,
    }


def adapter_card(entry: AdapterEntry, base: str, max_model_len: int) -> dict[str, Any]:
    """vLLM's fields for an adapter (`root`, `parent`), but no path of the host: `root` is the version."""
    summary = entry.artefact.summary if entry.artefact else None
    adapter: dict[str, Any] = {
        "state": entry.state.value,
        "version": entry.artefact.short if entry.artefact else None,
        "method": summary.method if summary else None,
        "rank": summary.rank if summary else None,
        "experts": summary.experts if summary else None,
        "bayesian": summary.bayesian if summary else None,
        "resident_bytes": entry.resident_bytes,
        "warnings": list(summary.warnings) if summary else [],
    }
    if entry.error is not None:
        adapter["error"] = {"code": entry.error.code, "message": entry.error.message, "hint": entry.error.hint}
    return base_card(entry.name, max_model_len) | {"root": entry.version, "parent": base, "adapter": adapter}
