"""vLLM's two adapter routes, with JSON answers and loads that run outside the engine step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from loramux.http.adapters import NAME_PATTERN
from loramux.http.cards import model_card, removed_card
from loramux.registry import Adapter

router = APIRouter(tags=["adapters"])


class LoadAdapter(BaseModel):
    """vLLM's request body, less the fields that have no meaning here."""

    lora_name: str = Field(pattern=NAME_PATTERN)
    lora_path: Path = Field(description="Folder under an --adapter-root.")
    load_inplace: bool = Field(False, description="Replace an adapter of the same name, without a gap.")


class UnloadAdapter(BaseModel):
    """vLLM's request body."""

    lora_name: str
    lora_int_id: int | None = Field(None, description="Accepted for compatibility, not used.")


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadAdapter, request: Request) -> dict[str, Any]:
    """Load an adapter and answer when requests may use it. Running requests are not disturbed."""
    services = request.app.state.loramux
    source = services.registry.check_source(body.lora_path, "lora_path")
    adapter = await services.registry.load(body.lora_name, source, replace=body.load_inplace)
    return _answer(f"Success: LoRA adapter '{adapter.name}' added successfully.", adapter, services)


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadAdapter, request: Request) -> dict[str, Any]:
    """Withdraw an adapter's name now; its memory is freed when its last running request ends."""
    services = request.app.state.loramux
    adapter = await services.registry.delete(body.lora_name)
    answer = _answer(f"Success: LoRA adapter '{adapter.name}' removed successfully.", adapter, services)
    answer["model"]["adapter"]["state"] = removed_card(adapter, request.app.state.loramux.calibrations)["state"]
    return answer


def _answer(message: str, adapter: Adapter, services: Any) -> dict[str, Any]:
    return {
        "message": message,
        "model": model_card(adapter, services.calibrations, services.base, services.max_model_len),
    }
