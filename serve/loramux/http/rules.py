"""What a request must show, by method and path alone.

    open    /, /health, /health/…, /metrics (unless protected), CORS preflights
    admin   what changes the server for everybody: adapters, and whatever is neither read nor inference
    key     all else

Matching is on the path the router sees. Where a rule asks for more (admin), the path is compared leniently, where it
asks for less (open) exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from loramux.http.asgi import Scope, headers, route_path

READ = frozenset({"GET", "HEAD"})
#: Where requests may have our fields beside OpenAI's.
COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
_OPEN = re.compile(r"/|/health(/[a-z_-]+)?")
_METRICS = re.compile(r"/metrics/?")
#: Inference outside /v1. Other requests that are not read (vLLM's /pause, /sleep, /scale_elastic_ep, …) are for admins,
#: so that a control route a later vLLM adds is not open to every key.
_INFERENCE = re.compile(
    r"/(tokenize|detokenize|invocations|ping|pooling|classify|score|rerank|generative_scoring)"
    r"|/inference/v1/generate|/(v1|v2|cohere)/.*",
    re.DOTALL,
)
_ALIASES: dict[tuple[str, ...], str] = {("v1", "load_lora_adapter"): "load", ("v1", "unload_lora_adapter"): "unload"}
#: `POST /v1/uncertainty/calibrate`, `DELETE /v1/uncertainty/calibrations/ID`.
_CALIBRATION: dict[tuple[str, ...], str] = {
    ("v1", "uncertainty", "calibrate"): "calibrate",
    ("v1", "uncertainty", "calibrations"): "uncalibrate",
}
_ACTIONS = frozenset({"rollback", "pin", "unpin"})


class Need(Enum):
    OPEN = "open"
    KEY = "key"
    ADMIN = "admin"


@dataclass(frozen=True)
class Lifecycle:
    """A request that changes an adapter. `adapter` is None if the path does not name it."""

    action: str
    adapter: str | None


def need(scope: Scope, *, protect_metrics: bool) -> Need:
    """What this request must show."""
    method, path = _method(scope), route_path(scope)
    if method in READ and (_OPEN.fullmatch(path) or (_METRICS.fullmatch(path) and not protect_metrics)):
        return Need.OPEN
    if method == "OPTIONS" and headers(scope, b"origin") and headers(scope, b"access-control-request-method"):
        return Need.OPEN  # answered by the CORS middleware, reaches no route
    if lifecycle(scope) is not None:
        return Need.ADMIN
    if method in READ or method == "OPTIONS" or _INFERENCE.fullmatch(path):
        return Need.KEY
    return Need.ADMIN


def lifecycle(scope: Scope) -> Lifecycle | None:
    """The change this request asks for, if it asks for one."""
    method, parts = _method(scope), _parts(route_path(scope))
    if method in READ or method == "OPTIONS":
        return None
    if action := _ALIASES.get(parts):
        return Lifecycle(action, None)
    if action := _CALIBRATION.get(parts[:3]):
        return Lifecycle(action, None)
    if parts[:2] != ("v1", "adapters"):
        return None
    name = parts[2:]
    if method == "POST" and len(name) > 1 and name[-1] in _ACTIONS:
        return Lifecycle(name[-1], "/".join(name[:-1]))
    return Lifecycle(method.lower(), "/".join(name))


def replaced(scope: Scope) -> bool:
    """Is this SageMaker's /adapters, which leads to vLLM's own loader: any path of the host, past our registry?"""
    return _parts(route_path(scope))[:1] == ("adapters",)


def _method(scope: Scope) -> str:
    """A WebSocket begins as a GET but is none to us: only inference speaks it."""
    return str(scope["method"]) if scope["type"] == "http" else "WEBSOCKET"


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)
