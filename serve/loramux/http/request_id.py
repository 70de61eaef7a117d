"""Every request has an id, its caller's if that is a usable one; every answer carries it."""

from __future__ import annotations

import re
from uuid import uuid4

from loramux.http.asgi import App, Message, Receive, Scope, Send, headers, request_state

_HEADER = b"x-request-id"
_USABLE = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestId:
    """ASGI middleware: X-Request-Id in the request (where vLLM takes its own id from), its answer, and our logs."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        given = headers(scope, _HEADER)
        request_id = given[0] if len(given) == 1 and _USABLE.fullmatch(given[0]) else uuid4().hex
        request_state(scope)["loramux_request_id"] = request_id

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _with_id(message.get("headers", ()), request_id)}
            await send(message)

        await self.app({**scope, "headers": _with_id(scope["headers"], request_id)}, receive, with_id)


def _with_id(pairs: object, request_id: str) -> list[tuple[bytes, bytes]]:
    others = [(key, value) for key, value in pairs if key.lower() != _HEADER]  # type: ignore[attr-defined]
    return [*others, (_HEADER, request_id.encode())]
