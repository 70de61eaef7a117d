"""OpenAI's error object, everywhere: `{"error": {"message", "type", "param", "code", "hint"}}`, `code` a string."""

from __future__ import annotations

import json
from typing import Any

from loramux.errors import LoramuxError
from loramux.http.asgi import Scope, Send, send_json

#: HTTP status -> (type, code) for errors that arrive without a string code (vLLM sends the number).
DEFAULTS: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_request"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    409: ("invalid_request_error", "conflict"),
    412: ("invalid_request_error", "precondition_failed"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    422: ("invalid_request_error", "invalid_request"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    501: ("server_error", "not_implemented"),
    503: ("server_error", "service_unavailable"),
    504: ("server_error", "timeout"),
}
HINTS: dict[str, str] = {
    "invalid_api_key": "Send the server's key: Authorization: Bearer KEY.",
    "admin_key_required": "Send the key of --admin-key: Authorization: Bearer KEY.",
    "route_not_allowed": "Use the routes for completions, /v1/uncertainty, /v1/models or /v1/adapters.",
    "request_timeout": "Send the body without pauses.",
    "request_too_large": "Send less, or start the server with a larger --max-body.",
    "not_found": "GET /openapi.json lists the routes.",
    "invalid_request": "Compare the request with the schema at /openapi.json.",
    "method_not_allowed": "GET /openapi.json lists the methods of each route.",
    "unsupported_media_type": "Send Content-Type: application/json.",
    "internal_error": "The server's log has the details.",
    "service_unavailable": "Try again shortly.",
    "not_ready": "Ask again shortly; the server's log has the details.",
}


def render(error: LoramuxError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of one of our errors."""
    body = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
        "hint": error.hint or HINTS.get(error.code),
    }
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body would go on arriving
    return error.status, {"error": body}, headers


async def refuse(scope: Scope, send: Send, error: LoramuxError) -> None:
    """Answer with `error` in place of the app; a WebSocket is closed before it opens."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": error.code})
        return
    status, body, named = render(error)
    await send_json(send, status, body, [(name.lower().encode(), value.encode()) for name, value in named.items()])


def normalise(status: int, body: Any) -> dict[str, Any]:
    """Any framework's JSON error body as OpenAI's object; nothing it said is lost."""
    error = body["error"] if has_error(body) else body
    if not isinstance(error, dict):
        error = {"message": str(error)}
    message = error.get("message") or error.get("detail") or f"HTTP {status}"
    type_, code = DEFAULTS.get(status, ("server_error", "internal_error"))
    if status == 404 and error.get("param") == "model":
        code = "model_not_found"
    if isinstance(error.get("code"), str):
        type_, code = str(error.get("type") or type_), error["code"]
    rest = {key: value for key, value in body.items() if key != "error"} if has_error(body) else {}
    return rest | {
        "error": {
            "message": message if isinstance(message, str) else json.dumps(message),
            "type": type_,
            "param": error.get("param"),
            "code": code,
            "hint": error.get("hint") or HINTS.get(code),
        }
    }


def has_error(body: Any) -> bool:
    return isinstance(body, dict) and "error" in body
