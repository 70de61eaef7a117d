"""`"uncertainty": {"mode": "score", "samples": 8}` in a completion request: how sure the answer is comes with it.

Each choice gets a field `uncertainty`, in a stream its chunk with the finish reason; with `per_token`, the entries of
`logprobs.content` get one too. What can be asked for is in `loramux.uncertainty.ask`; it is carried out by
`loramux.engine.uncertainty`. What can be refused is refused here, before a stream begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from loramux.errors import AdapterNotFound, InvalidRequest, LoramuxError
from loramux.http import abstention
from loramux.http.asgi import Receive, Scope, Send, field_in, replayed, request_state, with_length
from loramux.http.completions import OfCompletions
from loramux.http.composition import answered_by
from loramux.http.errors import refuse
from loramux.http.rewrite import Rewrite, each_event
from loramux.http.scored import is_scored
from loramux.registry import AdapterRegistry, Version
from loramux.registry.draws import MAX_SAMPLES, SAMPLES
from loramux.uncertainty.abstain import Action
from loramux.uncertainty.ask import FIELD, MIN_SAMPLES, SCORES, Ask, Mode, parse, resolve
from loramux.uncertainty.exchange import Exchange, exchange
from loramux.uncertainty.labels import tokenise
from loramux.uncertainty.recent import Recent

if TYPE_CHECKING:
    from loramux.http.app import Services


class UncertaintyReport(OfCompletions):
    """ASGI middleware inside `Composition`. Requests without the field pass untouched."""

    async def handle(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        scored = is_scored(scope)
        request = json.loads(body) if scored else field_in(body, FIELD)
        if request is None:
            await self.app(scope, receive, send)
            return
        try:
            services: Services = scope["app"].state.loramux
            asked = await (_of_given if scored else _of_request)(request, services)
            if asked is not None and asked.ask.abstain is not None:
                abstention.check(request, asked.ask.abstain, scope, services.registry)
        except LoramuxError as error:
            await refuse(scope, send, error)
            return
        body = json.dumps(request).encode()
        scope, receive = {**scope, "headers": with_length(scope["headers"], len(body))}, replayed(body, receive)
        if asked is None:
            await self.app(scope, receive, send)
            return
        call = partial(_call, asked, services.recent, request_state(scope).get("loramux_request_id"))
        events = each_event(partial(_add_to_event, asked, call))
        rewritten = Rewrite(send, answer=partial(_add_to_answer, asked, call), events=events)
        rule = asked.ask.abstain
        if rule is not None and rule.route_to is not None:
            await abstention.routed(
                partial(self._asking, asked), scope, request, receive, rewritten, asked, rule.route_to
            )
        else:
            await self._asking(asked, scope, receive, rewritten)

    async def _asking(self, asked: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        token = exchange.set(None if asked.choices else asked)  # what another model answers instead is not asked about
        try:
            await self.app(scope, receive, send)
        finally:
            exchange.reset(token)


async def _of_request(request: dict[str, Any], services: Services) -> Exchange | None:
    """What a request asks for, which is made what vLLM is to see. Raises LoramuxError."""
    ask = parse(request.pop(FIELD))
    return None if ask is None else await _prepared(request, ask, services)


async def _of_given(request: dict[str, Any], services: Services) -> Exchange:
    """The same for an answer that comes with the request (`scored.py`)."""
    text, ask = request.pop("completion"), parse(request.pop(FIELD, True))
    if ask is None or ask.mode not in (None, Mode.SCORE, Mode.FAST):
        raise InvalidRequest(
            "An answer can be scored, or read fast.", hint='Send "mode": "score".', param=f"{FIELD}.mode"
        )
    if ask.abstain is not None and ask.abstain.action is not Action.FLAG:
        raise InvalidRequest(
            "What was written elsewhere can only be flagged.", hint='Send "action": "flag".', param=FIELD
        )
    asked = await _prepared(request, ask, services)
    asked.text, asked.given = text, tuple(services.tokenizer.encode(text, add_special_tokens=False))
    request["max_tokens"] = 1  # none is written, but room for one is asked for
    return asked


async def _prepared(request: dict[str, Any], ask: Ask, services: Services) -> Exchange:
    """The exchange of a request, which is made what vLLM has to carry out. Raises LoramuxError."""
    version = await _version(request, services.registry)
    mode = resolve(ask, bayesian=version is not None and version.bayesian)
    if mode is Mode.SAMPLE:
        ask = _as_choices(request, ask)
    samples = ask.samples or SAMPLES
    if version is not None and version.bayesian and mode is not Mode.FAST:
        samples = await services.registry.samples(version, ask.samples)
    if ask.abstain is not None and ask.abstain.score not in SCORES[mode]:
        raise InvalidRequest(
            f"The mode {mode.value!r}, in which this model tells how sure it is, has no {ask.abstain.score!r}.",
            hint=f"It has {', '.join(SCORES[mode])}.",
            param=FIELD,
        )
    asked = _checked(request, ask, mode, samples)
    if mode is Mode.DECIDE:
        asked.labels = tokenise(ask.labels, services.tokenizer)
    return asked


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


def _as_choices(request: dict[str, Any], ask: Ask) -> Ask:
    """Samples are choices: whichever of the two numbers is given. Raises InvalidRequest if both are, and differ."""
    n = request.get("n")
    if n in (None, 1):
        return ask
    if type(n) is not int or not MIN_SAMPLES <= n <= MAX_SAMPLES or ask.samples not in (None, n):
        raise _conflict("n", f"as many choices as samples, {MIN_SAMPLES} to {MAX_SAMPLES}", "Leave `n` out.")
    return replace(ask, samples=n)


def _checked(request: dict[str, Any], ask: Ask, mode: Mode, samples: int) -> Exchange:
    """The exchange, with `request` made what vLLM has to carry out. Raises InvalidRequest for what cannot be both."""
    prompt = request.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise _conflict("prompt", "one prompt", "Send one request per prompt.")
    if request.get("use_beam_search"):
        raise _conflict("use_beam_search", "answers that are written one token at a time", "Leave it out.")
    asked = Exchange(ask, mode, samples)
    if mode is Mode.SAMPLE:
        request["n"] = samples
        if request.get("temperature") == 0:  # vLLM takes that for n equal answers; here each is another draw's
            request["temperature"], asked.greedy = 1.0, True
    elif mode is Mode.DECIDE:
        for field, allowed in (("n", (None, 1)), ("logprobs", (None, False)), ("echo", (None, False))):
            if request.get(field) not in allowed:
                raise _conflict(field, "one answer, of which `uncertainty` tells all", "Leave it out.")
    return asked


def _conflict(field: str, what: str, hint: str) -> InvalidRequest:
    return InvalidRequest(f"`uncertainty` is about {what}: `{field}` asks for something else.", hint=hint, param=field)


#: Given the id of an answer and a choice of it.
Call = Callable[[Any, dict[str, Any]], None]


def _call(asked: Exchange, recent: Recent, request_id: str | None, answer_id: Any, choice: dict[str, Any]) -> None:
    """Let feedback find a choice, unless it is another model's: the scores are not of that one."""
    index = choice.get("index", 0)
    one, told = asked.scored.get(index), asked.choices.get(index) or {}
    if one is not None and told.get("action") != Action.ROUTE:
        recent.call(one, [id for id in (request_id, answer_id) if isinstance(id, str)], index)


def _add_to_answer(asked: Exchange, call: Call, answer: dict[str, Any]) -> None:
    for choice in answer.get("choices", ()):
        _add(asked, choice)
        call(answer.get("id"), choice)
    _add_usage(asked, answer)


def _add_to_event(asked: Exchange, call: Call, event: dict[str, Any]) -> None:
    for choice in event.get("choices", ()):
        if choice.get("finish_reason") is not None:
            _add(asked, choice)
            call(event.get("id"), choice)
    _add_usage(asked, event)


def _add(asked: Exchange, choice: dict[str, Any]) -> None:
    told = choice[FIELD] = asked.choices.get(choice.get("index", 0))
    rule = asked.ask.abstain
    if told is not None and rule is not None and told["action"] == Action.REFUSE:
        abstention.refuse_choice(choice, rule)
    content = (choice.get("logprobs") or {}).get("content")
    if told is not None and content and len(told.get("tokens") or ()) == len(content):
        for entry, token in zip(content, told["tokens"], strict=True):
            entry[FIELD] = token


def _add_usage(asked: Exchange, answer: dict[str, Any]) -> None:
    """What the draws read is not in the prompt's tokens, nor in the answer's."""
    if isinstance(usage := answer.get("usage"), dict):
        usage["uncertainty_tokens"] = asked.tokens
