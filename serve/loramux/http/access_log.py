"""A line of JSON for every request (`loramux.access`) and one for every change (`loramux.audit`).

No prompt, no answer, no key is in them. JSON escapes what a client chose (path, model), so a line stays a line.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from datetime import UTC, datetime
from typing import Any

from loramux.http.asgi import App, Message, Receive, Scope, Send, request_state
from loramux.http.gate import gate_of
from loramux.http.parts import names_in
from loramux.http.rules import Lifecycle, lifecycle

access = logging.getLogger("loramux.access")
audit = logging.getLogger("loramux.audit")
#: Larger bodies are not parsed once more only to log their model: it takes milliseconds in which nobody is served.
_PEEK_BYTES = 256 * 2**10
_LONGEST = 256  # characters of one value
#: nginx's: the client left before the answer was complete.
_CLIENT_LEFT = 499


class AccessLog:
    """ASGI middleware, inside `RequestId` and outside all else: sees what the client gets."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gate, change = gate_of(scope), lifecycle(scope)
        logged = gate.access_log and scope["path"] not in gate.unlogged
        exchange = _Exchange(receive, send, peek=scope["method"] == "POST" and (logged or change is not None))
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            exchange.client_left()
            raise
        finally:
            state = request_state(scope)
            if logged:
                _write(access, exchange.access_line(scope, state))
            if change is not None:
                _write(audit, exchange.audit_line(scope, state, change))


class _Exchange:
    """What passes between client and app."""

    def __init__(self, receive: Receive, send: Send, *, peek: bool) -> None:
        self._receive, self._send = receive, send
        self._began = time.perf_counter()
        self._peeked: list[bytes] | None = [] if peek else None
        self._named: dict[str, Any] = {}  # the names in the body
        self._size = 0
        self._status: int | None = None
        self._bytes_out = 0
        self._ended = False
        self._left = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.client_left()
        elif self._peeked is not None:
            self._peek(self._peeked, message)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            self._bytes_out += len(message.get("body", b""))
            self._ended = not message.get("more_body")
        await self._send(message)

    def client_left(self) -> None:
        self._left = self._left or not self._ended

    def _peek(self, parts: list[bytes], message: Message) -> None:
        parts.append(message.get("body", b""))
        self._size += len(parts[-1])
        if message.get("more_body") and self._size <= _PEEK_BYTES:
            return
        self._peeked = None  # a stream may go on for minutes: its request is not kept
        if self._size <= _PEEK_BYTES:
            self._named = _names(b"".join(parts))

    @property
    def status(self) -> int:
        return _CLIENT_LEFT if self._left or self._status is None else self._status

    def access_line(self, scope: Scope, state: dict[str, Any]) -> dict[str, Any]:
        return {
            **_who(scope, state),
            "method": scope["method"],
            "path": scope["path"],
            "status": self.status,
            "seconds": round(time.perf_counter() - self._began, 6),
            "bytes": self._bytes_out,
            "model": self._named.get("model"),
            **({"adapters": self._named["adapters"]} if "adapters" in self._named else {}),
            "error": state.get("loramux_error"),
        }

    def audit_line(self, scope: Scope, state: dict[str, Any], change: Lifecycle) -> dict[str, Any]:
        return {
            **_who(scope, state),
            "action": change.action,
            "adapter": change.adapter or state.get("loramux_changed") or self._named.get("lora_name"),
            "status": self.status,
            "outcome": state.get("loramux_error") or ("ok" if self.status < 400 else "failed"),
        }


def _who(scope: Scope, state: dict[str, Any]) -> dict[str, Any]:
    caller = state.get("loramux_caller")
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": state.get("loramux_request_id"),
        "caller": caller.name if caller else None,
        "client": scope["client"][0] if scope.get("client") else None,
    }


def _names(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    named: dict[str, Any] = {name: value[name] for name in ("model", "lora_name") if isinstance(value.get(name), str)}
    return named | ({"adapters": parts} if (parts := names_in(value.get("adapters"))) else {})


def _write(logger: logging.Logger, line: dict[str, Any]) -> None:
    short = {key: value[:_LONGEST] if isinstance(value, str) else value for key, value in line.items()}
    logger.info("%s", json.dumps(short))
