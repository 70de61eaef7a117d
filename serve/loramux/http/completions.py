"""What middleware that reads the bodies of requests to some routes has in common."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from loramux.http.asgi import App, Receive, Scope, Send, read_body, replayed, route_path
from loramux.http.rules import COMPLETIONS


class OfPaths:
    """ASGI middleware of POST requests to `paths`: others pass untouched, and a client that left ends it."""

    paths: ClassVar[Collection[str]]

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or route_path(scope) not in self.paths:
            await self.app(scope, receive, send)
        elif (body := await read_body(receive)) is not None:
            await self.handle(scope, body, replayed(body, receive), send)

    async def handle(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Handle a request; `receive` gives the body once more."""
        raise NotImplementedError


class OfCompletions(OfPaths):
    """Of completion requests."""

    paths = COMPLETIONS
