"""OpenAI's error object, everywhere: `{"error": {"message", "type", "param", "code", "hint"}}`, `code` a string."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from loramux.errors import LoramuxError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: HTTP status -> (type, code) for errors that arrive without a string code (vLLM sends the number).
DEFAULTS: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_request"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    422: ("invalid_request_error", "invalid_request"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    501: ("server_error", "not_implemented"),
    503: ("server_error", "service_unavailable"),
}
HINTS: dict[str, str] = {
    "invalid_api_key": "Send the server's key: Authorization: Bearer KEY.",
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
    return error.status, {"error": body}, headers


def normalise(status: int, body: Any) -> dict[str, Any]:
    """Any framework's JSON error body as OpenAI's object; nothing it said is lost."""
    error = body["error"] if _has_error(body) else body
    if not isinstance(error, dict):
        error = {"message": str(error)}
    message = error.get("message") or error.get("detail") or f"HTTP {status}"
    type_, code = DEFAULTS.get(status, ("server_error", "internal_error"))
    if status == 404 and error.get("param") == "model":
        code = "model_not_found"
    if isinstance(error.get("code"), str):
        type_, code = str(error.get("type") or type_), error["code"]
    rest = {key: value for key, value in body.items() if key != "error"} if _has_error(body) else {}
    return rest | {
        "error": {
            "message": message if isinstance(message, str) else json.dumps(message),
            "type": type_,
            "param": error.get("param"),
            "code": code,
            "hint": error.get("hint") or HINTS.get(code),
        }
    }


def _has_error(body: Any) -> bool:
    return isinstance(body, dict) and "error" in body


class ErrorShape:
    """ASGI middleware: error responses leave in OpenAI's shape, whoever made them; streams pass untouched."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        parts: list[bytes] = []
        sent = False

        async def reshape(message: Message) -> None:
            nonlocal start, sent
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
                return
            if start is None or message["type"] != "http.response.body":
                sent = True
                await send(message)
                return
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            sent = True
            await _send_error(send, start, b"".join(parts))

        try:
            await self.app(scope, receive, reshape)
        except Exception:
            # Answered here, because Starlette's own handler of such errors lies outside all middleware; raised
            # again, because it also logs them.
            if not sent:
                await _send_error(send, {"type": "http.response.start", "status": 500}, b"")
            raise


async def _send_error(send: Send, start: Message, body: bytes) -> None:
    body = _reshaped(start["status"], body)
    dropped = (b"content-length", b"content-type")
    headers = [(key, value) for key, value in start.get("headers", ()) if key.lower() not in dropped]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _reshaped(status: int, body: bytes) -> bytes:
    try:
        parsed: Any = json.loads(body) if body else {}
    except ValueError:
        parsed = {"message": body.decode(errors="replace").strip()}
    return json.dumps(normalise(status, parsed)).encode()
