"""`"adapters": [{"name": "spam", "weight": 0.7}, …]` in a completion request: their weighted sum answers.

`model` is the base, or left out, and the answer's `model` is what it was. A name is whatever `model` could be; a part
without a weight has 1, and one with a `task` answers for that one of its tasks (MOELoRA). The sum is made, and on the
device, before the request goes on, by a name that only this request can use (`answered_by`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from loramux.errors import InvalidRequest, LoramuxError
from loramux.http.asgi import Receive, Scope, Send, field_in, replayed, with_length
from loramux.http.completions import OfCompletions
from loramux.http.errors import refuse
from loramux.http.gate import gate_of
from loramux.registry import AdapterRegistry, Share, Version

FIELD = "adapters"
MAX_PARTS = 8
#: A larger weight, or a smaller one, is a mistake: a LoRA changes a few percent of what its layer computes.
MAX_WEIGHT, MIN_WEIGHT = 100.0, 1e-6
_LONGEST = 256
_MAX_TASK = 2**31  # more digits than that in an error would help nobody
_HINT = 'Send "adapters": [{"name": "NAME", "weight": 0.7}, …]; GET /v1/models lists the names.'


@dataclass(frozen=True)
class Composed:
    """What answers a request, and what its answer calls it."""

    version: Version
    model: str


answered_by: ContextVar[Composed | None] = ContextVar("loramux_answered_by", default=None)


class Composition(OfCompletions):
    """ASGI middleware inside `ModelAccess`. Requests without the field pass untouched."""

    async def completion(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        request = field_in(body, FIELD) or {}
        async with AsyncExitStack() as held:
            try:
                parts = parts_in(request)
                if parts is not None:
                    model = _base(request, parts, gate_of(scope).bases)
                    registry: AdapterRegistry = scope["app"].state.loramux.registry
                    version = await held.enter_async_context(registry.composed(parts))
                    del request[FIELD]
                    body = json.dumps({**request, "model": version.tag}).encode()
                    scope = {**scope, "headers": with_length(scope["headers"], len(body))}
                    receive = replayed(body, receive)
                    held.callback(answered_by.reset, answered_by.set(Composed(version, model)))
            except LoramuxError as error:
                await refuse(scope, send, error)
                return
            await self.app(scope, receive, send)


def parts_in(request: Mapping[str, Any]) -> list[Share] | None:
    """The parts that a request asks for; None if it does not. Raises InvalidRequest."""
    value = request.get(FIELD)
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise InvalidRequest("`adapters` must be a list of one part or more.", hint=_HINT, param=FIELD)
    if len(value) > MAX_PARTS:
        raise InvalidRequest(
            f"{len(value)} parts are more than {MAX_PARTS}.",
            hint="Send fewer, or make one adapter of them and put it.",
            param=FIELD,
        )
    return [_part(part, f"{FIELD}[{place}]") for place, part in enumerate(value)]


def names_in(value: Any) -> list[str] | None:
    """The names in the field, as far as it is well-formed: for logs."""
    if not isinstance(value, list):
        return None
    names = [part.get("name") for part in value[:MAX_PARTS] if isinstance(part, dict)]
    return [name[:_LONGEST] for name in names if isinstance(name, str)]


def _part(part: Any, where: str) -> Share:
    if not isinstance(part, dict) or not {"name"} <= set(part) <= {"name", "weight", "task"}:
        raise InvalidRequest(
            f"{where} must have a `name`, may have a `weight` and a `task`, nothing else.", hint=_HINT, param=where
        )
    name, weight = part["name"], part.get("weight", 1.0)
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        raise InvalidRequest(f"The name must be text of 1 to {_LONGEST} characters.", hint=_HINT, param=f"{where}.name")
    # Compared as it is: an integer may be too large for a float. NaN is in no range.
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not MIN_WEIGHT <= abs(weight) <= MAX_WEIGHT:
        raise InvalidRequest(
            f"The weight must be a number whose size is between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}.",
            hint="Leave the part out instead of giving it no weight; without a weight it has 1.",
            param=f"{where}.weight",
        )
    task = part.get("task")
    if task is not None and (type(task) is not int or abs(task) > _MAX_TASK):
        raise InvalidRequest(
            "The task must be the id that it had in training.", hint="Send a whole number.", param=f"{where}.task"
        )
    return Share(name, float(weight), task)


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
                f"{part.name!r} is the base model, which every sum is added to.",
                hint="Leave it out of `adapters`.",
                param=f"{FIELD}[{place}].name",
            )
    return bases[0] if model is None else str(model)
