"""`"routing": true` in a completion request: the answer tells which experts of a mixture it used.

The answer's JSON object gets a field `routing`, and a stream one more chunk before `[DONE]`, with no choices:

    {"adapter": "desk@3f2a…", "tokens": 57, "decisions": 6840, "entropy_nats": 0.98,
     "experts": [{"expert": 0, "weight": 0.91, "selected": 0.93}, …]}

A decision is one token at one router; `weight` is the expert's mean share of the weight, `selected` how often it was
used at all. In a request for a router over several `adapters`, expert 0 is the first of those. `routing` is null where
the model is no mixture. Tokens found in the prefix cache were not routed again, and of a long prompt's step only the
first tokens are counted: `tokens` says how many there are.
"""

from __future__ import annotations

import json
from typing import Any

from loramux.errors import InvalidRequest
from loramux.http.asgi import Receive, Scope, Send, field_in
from loramux.http.completions import OfCompletions
from loramux.http.composition import answered_by
from loramux.http.errors import refuse
from loramux.http.rewrite import Rewrite
from loramux.metrics.routing import Report, wanted

_DONE = b"data: [DONE]"
_FIELD = "routing"


class RoutingReport(OfCompletions):
    """ASGI middleware. Requests that do not ask pass untouched, their answers unbuffered."""

    async def handle(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        asked = (field_in(body, _FIELD) or {}).get(_FIELD)
        if asked is None or asked is False:
            await self.app(scope, receive, send)
        elif asked is True:
            report, composed = Report(), answered_by.get()
            told = _Told(report, composed.order if composed else ())
            token = wanted.set(report)
            try:
                await self.app(scope, receive, Rewrite(send, answer=told.add, events=told.extended))
            finally:
                wanted.reset(token)
        else:
            hint = 'Send "routing": true, or leave it out.'
            await refuse(scope, send, InvalidRequest("routing must be true or false.", hint=hint, param=_FIELD))


class _Told:
    """The report, added to a JSON answer or to a stream."""

    def __init__(self, report: Report, order: tuple[int, ...]) -> None:
        self._report = report
        self._order = order  # which place in the request each expert has; empty: its own
        self._last = b""  # event of a stream

    def add(self, answer: dict[str, Any]) -> None:
        answer[_FIELD] = self._value()

    def extended(self, body: bytes) -> bytes:
        """A piece of a stream, with our chunk before its end if it has that."""
        if _DONE not in body:
            self._last = body if body.startswith(b"data: {") else self._last
            return body
        try:
            last = json.loads(self._last.removeprefix(b"data: ").partition(b"\n")[0])
            chunk = {key: last[key] for key in ("id", "object", "created", "model")}
        except (ValueError, KeyError, TypeError):  # nothing came before, or an error did
            return body
        event = json.dumps({**chunk, "choices": [], _FIELD: self._value()})
        return body.replace(_DONE, f"data: {event}\n\n".encode() + _DONE, 1)

    def _value(self) -> dict[str, Any] | None:
        value = self._report.value
        if value is None or not self._order:
            return value
        experts = [{**expert, "expert": self._order[expert["expert"]]} for expert in value["experts"]]
        return {**value, "experts": sorted(experts, key=lambda expert: expert["expert"])}
