"""What the API tells of an adapter. No path of the host is in it."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request

from loramux.errors import LoramuxError
from loramux.registry import Adapter, State
from loramux.uncertainty.calibration import Calibrations

_STARTED = int(time.time())


def visible(request: Request, name: str) -> bool:
    """Whether the caller may know of the adapter; authentication says who that is."""
    caller = request.scope.get("state", {}).get("loramux_caller")
    return caller is None or bool(caller.allows(name))


def adapter_card(adapter: Adapter, calibrations: Calibrations) -> dict[str, Any]:
    """A card of `/v1/adapters`: what the name means now, and what all its versions hold."""
    current, previous = adapter.current, adapter.previous
    return {
        "name": adapter.name,
        "object": "adapter",
        "state": current.state.value,
        "version": current.digest,
        "previous": previous.digest if previous else None,
        "pending": adapter.pending.state.value if adapter.pending else None,
        "pinned": adapter.pinned,
        **_content(adapter),
        "calibrations": calibrations.cards(adapter),
        "resident_bytes": sum(version.resident_bytes for version in adapter.versions()),
        "leases": sum(version.leases for version in adapter.versions()),
        "load_seconds": {stage: round(seconds, 6) for stage, seconds in current.load_seconds.items()},
        "last_used": current.last_used,
        "error": _error(adapter.error or current.error),
    }


def removed_card(adapter: Adapter, calibrations: Calibrations) -> dict[str, Any]:
    """The card of an adapter that was just deleted: draining until its last request ends."""
    draining = any(version.leases for version in adapter.versions())
    return adapter_card(adapter, calibrations) | {
        "state": (State.DRAINING if draining else State.GONE).value,
        "pending": None,
    }


def base_card(base: str, max_model_len: int) -> dict[str, Any]:
    """The base model in `/v1/models`."""
    return {
        "id": base,
        "object": "model",
        "created": _STARTED,
        "owned_by": "loramux",
        "root": base,
        "parent": None,
        "max_model_len": max_model_len,
    }


def model_card(adapter: Adapter, calibrations: Calibrations, base: str, max_model_len: int) -> dict[str, Any]:
    """An adapter in `/v1/models`: vLLM's fields (`root`, `parent`), where `root` is the version, and ours."""
    current = adapter.current
    ours: dict[str, Any] = {
        "state": current.state.value,
        "version": current.digest,
        **_content(adapter),
        "calibrations": [calibration.short() for calibration in calibrations.of(current)],
        "resident_bytes": sum(version.resident_bytes for version in adapter.versions()),
    }
    if (error := adapter.error or current.error) is not None:
        ours["error"] = _error(error)
    return base_card(adapter.name, max_model_len) | {"root": current.tag, "parent": base, "adapter": ours}


def _content(adapter: Adapter) -> dict[str, Any]:
    artefact = adapter.current.artefact
    summary = artefact.summary if artefact else None
    return {
        "method": summary.method if summary else None,
        "rank": summary.rank if summary else None,
        "experts": summary.experts if summary else None,
        "tasks": summary.tasks if summary else None,
        "bayesian": summary.bayesian if summary else None,
        "warnings": list(summary.warnings) if summary else [],
    }


def _error(error: LoramuxError | None) -> dict[str, Any] | None:
    return {"code": error.code, "message": error.message, "hint": error.hint} if error else None
