"""`/v1/uncertainty/calibrations`: what is forgotten; adapters' cards list what there is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from loramux.http.asgi import request_state

router = APIRouter(tags=["uncertainty"])


@router.delete("/v1/uncertainty/calibrations/{id}")
async def delete_calibration(id: str, request: Request) -> dict[str, Any]:
    """Forget a calibration: answers are as they were before it."""
    calibrations = request.app.state.loramux.calibrations
    row = calibrations.find(id)
    request_state(request.scope)["loramux_changed"] = row.name
    card: dict[str, Any] = await calibrations.forget(row)
    return {"object": "calibration", "model": row.name, **card, "deleted": True}
