"""`GET /v1/models`: the base and its adapters, in OpenAI's shape with an `adapter` object."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from loramux.http.cards import base_card, model_card, visible

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The base model first, then every adapter the caller may use, with its state."""
    services = request.app.state.loramux
    cards = [base_card(services.base, services.max_model_len)]
    cards += [
        model_card(adapter, services.calibrations, services.base, services.max_model_len)
        for name, adapter in services.registry.adapters().items()
        if visible(request, name)
    ]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    """One card. 404 `model_not_found` names close matches."""
    services = request.app.state.loramux
    if name == services.base:
        return base_card(services.base, services.max_model_len)
    adapter = services.registry.adapter(name)
    return model_card(adapter, services.calibrations, services.base, services.max_model_len)
