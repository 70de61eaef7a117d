"""An app behind the whole of our middleware, and hand-written ASGI calls to it."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from loramux.http.gate import Gate, install
from loramux.http.keys import Caller, Key, KeyRing
from loramux.http.stack import MIDDLEWARE

BASE = "tiny-base"
KEY, ADMIN, TEAM = "sk-plain-key", "sk-admin-key", "sk-team-key"
#: One key of each kind.
KEYS = KeyRing(
    (
        Key.of(KEY, Caller("api-key", admin=False)),
        Key.of(TEAM, Caller("team-a", admin=False, adapters=("sql", "legal-*"))),
        Key.of(ADMIN, Caller("admin", admin=True)),
    ),
    anonymous=None,
)


def gate(**more: Any) -> Gate:
    return Gate(**{"keys": KEYS, "bases": (BASE,), **more})


@dataclass
class Answer:
    """What a client saw."""

    status: int | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    messages: list[dict[str, Any]] = field(default_factory=list)

    def header(self, name: str) -> list[str]:
        return [value.decode() for key, value in self.headers if key.decode().lower() == name]

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code", "hint"}
        return error


class Inner:
    """Stands in for vLLM: remembers what reached it, reads the body, answers 200 with what it read."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        parts, more = [], True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        self.bodies.append(b"".join(parts))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    @property
    def caller(self) -> Caller:
        caller: Caller = self.scopes[-1]["state"]["loramux_caller"]
        return caller


def guarded(inner: Any, by: Gate | None = None, layers: Iterable[Any] = MIDDLEWARE, services: Any = None) -> Any:
    """`inner` inside our middleware, as vLLM would build it; without a gate: as somebody else would."""
    args = Namespace()
    if by is not None:
        install(args, by)
    app = inner
    for layer in reversed(list(layers)):
        app = layer(app)
    outermost, state = app, SimpleNamespace(args=args, loramux=services)

    async def with_app(scope: Any, receive: Any, send: Any) -> None:
        await outermost({**scope, "app": SimpleNamespace(state=state)}, receive, send)

    return with_app


async def call(
    app: Any,
    method: str = "GET",
    path: str = "/v1/models",
    *,
    key: str | None = None,
    headers: Mapping[str, str] | Iterable[tuple[bytes, bytes]] = (),
    body: bytes | Iterable[bytes] = b"",
    receive: Callable[[], Any] | None = None,
    **scope: Any,
) -> Answer:
    """One request. `body` in pieces is sent in pieces; without a given `receive` the client then stays."""
    pairs = (
        [(k.lower().encode(), v.encode("latin-1")) for k, v in headers.items()]
        if isinstance(headers, Mapping)
        else headers
    )
    pairs = [*pairs, *([(b"authorization", f"Bearer {key}".encode())] if key is not None else [])]
    pieces = [body] if isinstance(body, bytes) else list(body)
    coming = [{"type": "http.request", "body": b, "more_body": i + 1 < len(pieces)} for i, b in enumerate(pieces)]
    answer = Answer()

    async def next_message() -> Any:
        return coming.pop(0) if coming else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        answer.messages.append(dict(message))
        if message["type"] == "http.response.start":
            assert answer.status is None, "answered twice"
            answer.status, answer.headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            answer.body += message.get("body", b"")

    await app(
        {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode("utf-8", "surrogatepass"),
            "query_string": b"",
            "headers": pairs,
            "client": ("192.0.2.7", 40000),
            **scope,
        },
        receive or next_message,
        send,
    )
    return answer


def chat(model: Any = BASE, **more: Any) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "a secret prompt"}], **more}).encode()
