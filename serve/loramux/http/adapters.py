"""vLLM's two adapter routes, with JSON answers and loads that run outside the engine step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from loramux.config import ADAPTER_NAME
from loramux.http.models import adapter_card

router = APIRouter(tags=["adapters"])


class LoadAdapter(BaseModel):
    """vLLM's request body, less the fields that have no meaning here."""

    lora_name: str = Field(pattern=f"^{ADAPTER_NAME.pattern}$")
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
    source = services.registry.check_source(body.lora_path)
    entry = await services.registry.load(body.lora_name, source, replace=body.load_inplace)
    return _answer(f"Success: LoRA adapter '{entry.name}' added successfully.", entry, services)


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadAdapter, request: Request) -> dict[str, Any]:
    """Withdraw an adapter's name now; its memory is freed when its last running request ends."""
    services = request.app.state.loramux
    entry = await services.registry.unload(body.lora_name)
    return _answer(f"Success: LoRA adapter '{entry.name}' removed successfully.", entry, services)


def _answer(message: str, entry: Any, services: Any) -> dict[str, Any]:
    return {"message": message, "model": adapter_card(entry, services.base, services.max_model_len)}
