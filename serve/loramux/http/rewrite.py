"""A send that changes the JSON of an answer, whole or streamed as events, on its way to the client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from loramux.http.asgi import Message, Send, with_length

_EVENT = b"data: "
#: Changes an answer's JSON object in place.
Change = Callable[[dict[str, Any]], None]


class Rewrite:
    """Successful JSON answers are held back until they are whole, events pass at once, the rest untouched."""

    def __init__(self, send: Send, *, answer: Change, event: Change) -> None:
        self._send = send
        self._answer = answer
        self._event = event
        self._start: Message | None = None  # of a JSON answer
        self._parts: list[bytes] = []
        self._events = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = _content_type(message) if message["status"] == 200 else b""
            self._events = kind.startswith(b"text/event-stream")
            if kind.startswith(b"application/json"):
                self._start = message
                return
        elif message["type"] == "http.response.body":
            if self._start is not None:
                self._parts.append(message.get("body", b""))
                if not message.get("more_body"):
                    await self._finish(self._start)
                return
            if self._events:
                lines = message.get("body", b"").split(b"\n")
                message = {**message, "body": b"\n".join(map(self._line, lines))}
        await self._send(message)

    async def _finish(self, start: Message) -> None:
        body = _changed(b"".join(self._parts), self._answer)
        await self._send({**start, "headers": with_length(start["headers"], len(body))})
        await self._send({"type": "http.response.body", "body": body})

    def _line(self, line: bytes) -> bytes:
        return _EVENT + _changed(line.removeprefix(_EVENT), self._event) if line.startswith(_EVENT) else line


def _changed(body: bytes, change: Change) -> bytes:
    try:
        value = json.loads(body)
    except ValueError:  # [DONE]
        return body
    if not isinstance(value, dict) or "error" in value:
        return body
    change(value)
    return json.dumps(value).encode()


def _content_type(start: Message) -> bytes:
    return next((bytes(value) for key, value in start["headers"] if key.lower() == b"content-type"), b"")
