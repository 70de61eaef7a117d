"""A request whose `adapters` are several (`parts.py`) is answered by their weighted sum, or by a router over them.

`model` is the base, or left out, and the answer's `model` is what it was. What is asked for is made, and on the device,
before the request goes on, by a name that only this request can use (`answered_by`).
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from loramux.errors import InvalidRequest, LoramuxError
from loramux.http.asgi import Receive, Scope, Send, field_in, replayed, with_length
from loramux.http.completions import OfCompletions
from loramux.http.errors import refuse
from loramux.http.gate import gate_of
from loramux.http.parts import FIELDS, PARTS, wish_in
from loramux.registry import AdapterRegistry, Share, Version


@dataclass(frozen=True)
class Composed:
    """What answers a request, and what its answer calls it. If it is a router, expert e is the part `order[e]`."""

    version: Version
    model: str
    order: tuple[int, ...] = ()


answered_by: ContextVar[Composed | None] = ContextVar("loramux_answered_by", default=None)


class Composition(OfCompletions):
    """ASGI middleware inside `ModelAccess`. Requests without the fields pass untouched."""

    async def handle(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        request = field_in(body, *FIELDS) or {}
        async with AsyncExitStack() as held:
            try:
                if (wish := wish_in(request)) is not None:
                    model = _base(request, wish.parts, gate_of(scope).bases)
                    registry: AdapterRegistry = scope["app"].state.loramux.registry
                    version, order = await held.enter_async_context(registry.composed(*wish))
                    others = {name: value for name, value in request.items() if name not in FIELDS}
                    body = json.dumps({**others, "model": version.tag}).encode()
                    scope = {**scope, "headers": with_length(scope["headers"], len(body))}
                    receive = replayed(body, receive)
                    held.callback(answered_by.reset, answered_by.set(Composed(version, model, order)))
            except LoramuxError as error:
                await refuse(scope, send, error)
                return
            await self.app(scope, receive, send)


def _base(request: dict[str, Any], parts: list[Share], bases: tuple[str, ...]) -> str:
    """The model that the request names. Raises InvalidRequest if that is not the base, or a part is."""
    model = request.get("model")
    if model not in (None, *bases):
        raise InvalidRequest(
            "With `adapters`, `model` must be the base model.",
            hint=f'Send "model": "{bases[0]}", and name every adapter in `adapters`.',
            param="model",
        )
    for place, part in enumerate(parts):
        if part.name in bases:
            raise InvalidRequest(
                f"{part.name!r} is the base model, which every part is added to.",
                hint="Leave it out of `adapters`.",
                param=f"{PARTS}[{place}].name",
            )
    return bases[0] if model is None else str(model)
