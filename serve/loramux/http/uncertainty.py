"""`"uncertainty": {"mode": "score", "samples": 8}` in a completion request: how sure the answer is comes with it.

Each choice gets a field `uncertainty`, in a stream its chunk with the finish reason; with `per_token`, the entries of
`logprobs.content` get one too. What can be asked for is in `loramux.uncertainty.ask`; it is carried out by
`loramux.engine.uncertainty`. What can be refused is refused here, before a stream begins.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from loramux.errors import AdapterNotFound, InvalidRequest, LoramuxError
from loramux.http.asgi import App, Receive, Scope, Send, read_body, replayed, route_path
from loramux.http.composition import answered_by
from loramux.http.errors import refuse
from loramux.http.rewrite import Rewrite
from loramux.registry import AdapterRegistry, Version
from loramux.uncertainty.ask import FIELD, MAX_SAMPLES, MIN_SAMPLES, SAMPLES, Ask, Mode, parse, resolve
from loramux.uncertainty.exchange import Exchange, exchange

_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


class UncertaintyReport:
    """ASGI middleware inside `Composition`. Requests without the field pass untouched."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or route_path(scope) not in _PATHS:
            await self.app(scope, receive, send)
            return
        body = await read_body(receive)
        if body is None:
            return  # the client left
        try:
            asked, body = await _asked(body, scope["app"])
        except LoramuxError as error:
            await refuse(scope, send, error)
            return
        receive = replayed(body, receive)
        if asked is None:
            await self.app(scope, receive, send)
            return
        token = exchange.set(asked)
        rewritten = Rewrite(send, answer=partial(_add_to_answer, asked), event=partial(_add_to_event, asked))
        try:
            await self.app(_with_length(scope, len(body)), receive, rewritten)
        finally:
            exchange.reset(token)


async def _asked(body: bytes, app: Any) -> tuple[Exchange | None, bytes]:
    """What the body asks for, and the body as vLLM is to see it. Raises LoramuxError."""
    # Most requests are not parsed twice. Escapes and other encodings may hide the field from a search.
    if not (b'"uncertainty"' in body or b"\\u00" in body or b"\0" in body):
        return None, body
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None, body
    if not isinstance(request, dict) or FIELD not in request:
        return None, body
    ask = parse(request.pop(FIELD))
    if ask is None:
        return None, json.dumps(request).encode()
    services = app.state.loramux
    version = await _version(request, services.registry)
    mode = resolve(ask, bayesian=version is not None and version.bayesian)
    asked = _checked(request, ask, mode)
    if version is not None and version.bayesian and mode is not Mode.FAST:
        services.registry.check_room(version, asked.samples)
    if mode is Mode.DECIDE:
        asked.labels = services.tokenise(ask.labels)
    return asked, json.dumps(request).encode()


async def _version(request: dict[str, Any], registry: AdapterRegistry) -> Version | None:
    """What answers, on the device; None for the base model, and for what the route will not find either."""
    if (composed := answered_by.get()) is not None:
        return composed.version
    model = request.get("model")
    if not isinstance(model, str):
        return None
    try:
        return await registry.resolve(model)
    except AdapterNotFound:
        return None


def _checked(request: dict[str, Any], ask: Ask, mode: Mode) -> Exchange:
    """The exchange, with `request` made what vLLM has to carry out. Raises InvalidRequest for what cannot be both."""
    prompt, n = request.get("prompt"), request.get("n")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise _conflict("prompt", "one prompt", "Send one request per prompt.")
    if request.get("use_beam_search"):
        raise _conflict("use_beam_search", "answers that are written one token at a time", "Leave it out.")
    asked = Exchange(ask, mode, ask.samples or SAMPLES)
    if mode is Mode.SAMPLE:
        if n in (None, 1):
            n = asked.samples
        asked.samples = n if ask.samples is None else ask.samples
        if n != asked.samples or not isinstance(n, int) or not MIN_SAMPLES <= n <= MAX_SAMPLES:
            raise _conflict("n", f"as many choices as samples, {MIN_SAMPLES} to {MAX_SAMPLES}", "Leave `n` out.")
        request["n"] = n
        if request.get("temperature") == 0:  # vLLM takes that for n equal answers; here each is another draw's
            request["temperature"], asked.greedy = 1.0, True
    elif mode is Mode.DECIDE:
        for field, allowed in (("n", (None, 1)), ("logprobs", (None, False)), ("echo", (None, False))):
            if request.get(field) not in allowed:
                raise _conflict(field, "one answer, of which `uncertainty` tells all", "Leave it out.")
    return asked


def _conflict(field: str, what: str, hint: str) -> InvalidRequest:
    return InvalidRequest(f"`uncertainty` is about {what}: `{field}` asks for something else.", hint=hint, param=field)


def _add_to_answer(asked: Exchange, answer: dict[str, Any]) -> None:
    for choice in answer.get("choices", ()):
        _add(asked, choice)
    _add_usage(asked, answer)


def _add_to_event(asked: Exchange, event: dict[str, Any]) -> None:
    for choice in event.get("choices", ()):
        if choice.get("finish_reason") is not None:
            _add(asked, choice)
    _add_usage(asked, event)


def _add(asked: Exchange, choice: dict[str, Any]) -> None:
    told = choice[FIELD] = asked.choices.get(choice.get("index", 0))
    content = (choice.get("logprobs") or {}).get("content")
    if told is not None and content and len(told.get("tokens") or ()) == len(content):
        for entry, token in zip(content, told["tokens"], strict=True):
            entry[FIELD] = token


def _add_usage(asked: Exchange, answer: dict[str, Any]) -> None:
    """What the draws read is not in the prompt's tokens, nor in the answer's."""
    if isinstance(usage := answer.get("usage"), dict):
        usage["uncertainty_tokens"] = asked.tokens


def _with_length(scope: Scope, length: int) -> Scope:
    others = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    return {**scope, "headers": [*others, (b"content-length", str(length).encode())]}
