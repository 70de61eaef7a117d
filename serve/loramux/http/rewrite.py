"""A send that changes the JSON of an answer, whole or streamed as events, on its way to the client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from loramux.http.asgi import Message, Send, content_type, with_length

_EVENT = b"data: "
#: Changes an answer's JSON object in place.
Change = Callable[[dict[str, Any]], None]


class Rewrite:
    """Successful JSON answers are held back until they are whole, events pass at once, the rest untouched.

    `events` is given each piece of a stream, whole events, and returns what passes in its place.
    """

    def __init__(self, send: Send, *, answer: Change, events: Callable[[bytes], bytes]) -> None:
        self._send = send
        self._answer = answer
        self._events = events
        self._start: Message | None = None  # of a JSON answer
        self._parts: list[bytes] = []
        self._streamed = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = content_type(message) if message["status"] == 200 else b""
            self._streamed = kind.startswith(b"text/event-stream")
            if kind.startswith(b"application/json"):
                self._start = message
                return
        elif message["type"] == "http.response.body":
            if self._start is not None:
                self._parts.append(message.get("body", b""))
                if not message.get("more_body"):
                    await self._finish(self._start)
                return
            if self._streamed:
                message = {**message, "body": self._events(message.get("body", b""))}
        await self._send(message)

    async def _finish(self, start: Message) -> None:
        body = _changed(b"".join(self._parts), self._answer)
        await self._send({**start, "headers": with_length(start["headers"], len(body))})
        await self._send({"type": "http.response.body", "body": body})


def each_event(change: Change) -> Callable[[bytes], bytes]:
    """For `Rewrite`: every event is changed."""

    def line(text: bytes) -> bytes:
        return _EVENT + _changed(text.removeprefix(_EVENT), change) if text.startswith(_EVENT) else text

    return lambda body: b"\n".join(map(line, body.split(b"\n")))


def _changed(body: bytes, change: Change) -> bytes:
    try:
        value = json.loads(body)
    except ValueError:  # [DONE]
        return body
    if not isinstance(value, dict) or "error" in value:
        return body
    change(value)
    return json.dumps(value).encode()
