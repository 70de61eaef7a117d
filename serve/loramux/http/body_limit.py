"""Bodies have a size and a time."""

from __future__ import annotations

import asyncio

from loramux.errors import LoramuxError, RequestTimeout, RequestTooLarge
from loramux.http.asgi import App, Message, Receive, Scope, Send, headers
from loramux.http.errors import refuse
from loramux.http.gate import gate_of
from loramux.units import format_bytes

#: A body may take this long, and longer by a second for so many bytes that came: a slow line is served, a client that
#: trickles bytes to hold connections is not. (Apache's RequestReadTimeout works like this.)
PATIENCE_S = 30.0
MIN_BYTES_PER_S = 16 * 2**10


class BodyLimit:
    """ASGI middleware: 413 for a body over `--max-body`, unread if its length is declared; 408 for one that stalls."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _LimitedBody(receive, gate_of(scope).max_body)
        started = False

        async def unless_refused(message: Message) -> None:
            nonlocal started
            if started or body.refusal is None:
                started = True
                await send(message)

        try:
            body.expect(headers(scope, b"content-length"))
            await self.app(scope, body, unless_refused)
        except Exception:
            if started or body.refusal is None:
                raise
        # Not left to whoever read the body: frameworks make a 400 of any error there.
        if body.refusal is not None and not started:
            await refuse(scope, send, body.refusal)


class _LimitedBody:
    """A receive that raises, once and for all, when the body breaks a limit."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit = receive, limit
        self._size = 0
        self._complete = False
        self._since: float | None = None  # the clock runs from the first read
        self.refusal: LoramuxError | None = None

    def expect(self, declared: list[str]) -> None:
        for length in declared:
            if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > self._limit):
                self._refuse_size()

    async def __call__(self) -> Message:
        if self.refusal is not None:
            raise self.refusal
        if self._complete:
            return await self._receive()  # waits for the client to leave
        loop = asyncio.get_running_loop()
        self._since = loop.time() if self._since is None else self._since
        try:
            async with asyncio.timeout_at(self._since + PATIENCE_S + self._size / MIN_BYTES_PER_S):
                message = await self._receive()
        except TimeoutError:
            self.refusal = RequestTimeout(f"The request's body did not arrive in time ({self._size} bytes did).")
            raise self.refusal from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._complete = not message.get("more_body")
            if self._size > self._limit:
                self._refuse_size()
        return message

    def _refuse_size(self) -> None:
        self.refusal = RequestTooLarge(f"The request's body is larger than {format_bytes(self._limit)}.")
        raise self.refusal
