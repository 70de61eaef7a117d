"""What middleware that reads the bodies of completion requests has in common."""

from __future__ import annotations

from loramux.http.asgi import App, Receive, Scope, Send, read_body, replayed, route_path
from loramux.http.rules import COMPLETIONS


class OfCompletions:
    """ASGI middleware: other requests pass untouched, and so does the end of a client that left."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or route_path(scope) not in COMPLETIONS:
            await self.app(scope, receive, send)
        elif (body := await read_body(receive)) is not None:
            await self.completion(scope, body, replayed(body, receive), send)

    async def completion(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Handle a completion request; `receive` gives the body once more."""
        raise NotImplementedError
