"""Whoever made an error, it leaves in OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

from loramux.http.asgi import App, Message, Receive, Scope, Send, content_type, request_state, with_length
from loramux.http.errors import has_error, normalise

_EVENT = b"data: "


class ErrorShape:
    """ASGI middleware: error responses, and errors within event streams, leave in OpenAI's shape, whoever made them.

    Streams pass chunk by chunk.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        shape = _Shape(scope, send)
        try:
            await self.app(scope, receive, shape)
        except Exception:
            # Answered here, because Starlette's own handler of such errors lies outside all middleware; raised
            # again, because it also logs them.
            await shape.crashed()
            raise


class _Shape:
    """A send that holds back an error until it is whole, and looks for errors in event streams."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._start: Message | None = None  # of an error
        self._parts: list[bytes] = []
        self._sent = self._ended = self._events = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self._start = message
                return
            self._events = content_type(message).startswith(b"text/event-stream")
        if message["type"] == "http.response.body":
            self._ended = not message.get("more_body")
            if self._start is not None:
                self._parts.append(message.get("body", b""))
                if self._ended:
                    await self._send_error(self._start, b"".join(self._parts))
                return
            if self._events:
                message = self._reshape_events(message)
        self._sent = True
        await self._send(message)

    async def crashed(self) -> None:
        """Answer for an app that raised: a 500 if nothing was sent, a last event if a stream of them was."""
        if not self._sent:
            await self._send_error({"type": "http.response.start", "status": 500}, b"")
        elif self._events and not self._ended:
            event = b"data: " + self._shaped(500, {}) + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def _send_error(self, start: Message, body: bytes) -> None:
        self._sent = True
        try:
            parsed: Any = json.loads(body) if body else {}
        except ValueError:
            parsed = {"message": body.decode(errors="replace").strip()}
        body = self._shaped(start["status"], parsed)
        headers = [(key, value) for key, value in start.get("headers", ()) if key.lower() != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        await self._send({**start, "headers": with_length(headers, len(body))})
        await self._send({"type": "http.response.body", "body": body})

    def _reshape_events(self, message: Message) -> Message:
        # An answer's text cannot look like this: in it, as in all JSON strings, quotes are escaped.
        if _EVENT + b'{"error"' not in message.get("body", b""):
            return message
        lines = [self._reshape_line(line) for line in message["body"].split(b"\n")]
        return {**message, "body": b"\n".join(lines)}

    def _reshape_line(self, line: bytes) -> bytes:
        if not line.startswith(_EVENT):
            return line
        try:
            event = json.loads(line.removeprefix(_EVENT))
        except ValueError:
            return line
        if not has_error(event):
            return line
        code = event["error"].get("code") if isinstance(event["error"], dict) else None
        return _EVENT + self._shaped(code if isinstance(code, int) else 500, event)

    def _shaped(self, status: int, body: Any) -> bytes:
        shaped = normalise(status, body)
        request_state(self._scope)["loramux_error"] = shaped["error"]["code"]
        return json.dumps(shaped).encode()
