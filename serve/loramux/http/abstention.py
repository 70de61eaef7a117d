"""Answers that are not given as they are not sure: refused, or left to another model (`uncertainty/abstain.py`)."""

from __future__ import annotations

import json
from typing import Any

from loramux.errors import InvalidRequest
from loramux.http.asgi import App, Message, Receive, Scope, Send, replayed, request_state, with_length
from loramux.http.gate import gate_of
from loramux.http.model_access import adapter_of, not_found
from loramux.registry import AdapterRegistry
from loramux.uncertainty.abstain import ABOVE, BELOW, Action, Rule
from loramux.uncertainty.ask import FIELD
from loramux.uncertainty.exchange import Exchange


def check(request: dict[str, Any], rule: Rule, scope: Scope, registry: AdapterRegistry) -> None:
    """Raises InvalidRequest for what cannot be taken back, AdapterNotFound for a `route_to` that the caller has not."""
    if rule.action is not Action.FLAG and request.get("stream"):
        raise InvalidRequest(
            f"A stream cannot take back what it has said, which {rule.action.value!r} would.",
            hint='Send "action": "flag", or no "stream".',
            param="stream",
        )
    if rule.route_to is None:
        return
    if request.get("n") not in (None, 1):
        raise InvalidRequest("Several choices cannot be routed.", hint="Leave `n` out.", param="n")
    adapter = adapter_of(rule.route_to, gate_of(scope).bases)
    caller = request_state(scope).get("loramux_caller")
    if adapter is not None and (adapter not in registry.adapters() or not (caller is None or caller.allows(adapter))):
        raise not_found(rule.route_to, f"{FIELD}.{BELOW if rule.below else ABOVE}.route_to")


def refuse_choice(choice: dict[str, Any], rule: Rule) -> None:
    """Leave the text of a choice out."""
    if "message" in choice:
        choice["message"] |= {"content": None, "refusal": rule.reason}
    else:
        choice["text"] = ""
    choice["logprobs"] = None
    choice.pop("token_ids", None)


async def routed(
    app: App, scope: Scope, request: dict[str, Any], receive: Receive, send: Send, asked: Exchange, model: str
) -> None:
    """Pass on what `app` answers, or, if that is not sure, what it answers as `model`."""
    held: list[Message] = []

    async def hold(message: Message) -> None:
        held.append(message)

    await app(scope, receive, hold)
    told = asked.choices.get(0)
    if told is None or told["action"] is None:  # sure, or an error
        for message in held:
            await send(message)
        return
    body = json.dumps({**request, "model": model}).encode()
    scope = {**scope, "headers": with_length(scope["headers"], len(body))}
    await app(scope, replayed(body, receive), send)
