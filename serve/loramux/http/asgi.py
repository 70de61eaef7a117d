"""The ASGI vocabulary our middleware shares."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from loramux.errors import InvalidRequest

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: How JSON may write a letter from a to z otherwise: U+0061 to U+007A.
_ESCAPED_LETTER = re.compile(rb"\\u00[67]")


def route_path(scope: Scope) -> str:
    """The path the router will match: decoded, less the root path, compared character by character.

    As Starlette computes it, so that a rule about a path and the route behind it can never mean different paths.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path


def headers(scope: Scope, name: bytes) -> list[str]:
    """Every value of a header, in order; `name` in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def request_state(scope: Scope) -> dict[str, Any]:
    """What `request.state` shows; the server makes a fresh one for every request.

    Ours in it: `loramux_request_id`, `loramux_caller`, `loramux_changed` (the adapter that a change is of, where the
    path does not name it) and, once there is an error, its code `loramux_error`.
    """
    state: dict[str, Any] = scope.setdefault("state", {})
    return state


async def read_body(receive: Receive) -> bytes | None:
    """The whole body (`BodyLimit` bounds it), None if the client left."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives a body that was read already."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def field_in(body: bytes, *names: str) -> dict[str, Any] | None:
    """The JSON object that a body is, if it has a key of these names, which are letters from a to z; else None.

    What is no JSON object is left to the route to refuse. Most bodies are not parsed: a key stands in it as it is, has
    a letter escaped, or the body is UTF-16 or UTF-32, where letters have null bytes.
    """
    if not (any(b'"%b"' % name.encode() in body for name in names) or b"\0" in body or _ESCAPED_LETTER.search(body)):
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and any(name in value for name in names) else None


def json_object(body: bytes, hint: str) -> dict[str, Any]:
    """Raises InvalidRequest for a body that is none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.", hint=hint)
    return value


async def send_json(send: Send, status: int, value: Any, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """A whole response."""
    content = json.dumps(value).encode()
    headers = with_length([*headers, (b"content-type", b"application/json")], len(content))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def content_type(start: Message) -> bytes:
    """What the start of a response says its body is; empty if it does not."""
    return next((bytes(value) for key, value in start.get("headers", ()) if key.lower() == b"content-type"), b"")


def with_length(headers: Iterable[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """The headers, with this Content-Length instead of what they say."""
    others = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*others, (b"content-length", str(length).encode())]
