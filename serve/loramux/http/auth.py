"""No request without a key that must have one, and none of an ordinary key that changes the server."""

from __future__ import annotations

from loramux.errors import AdminKeyRequired, InvalidApiKey, LoramuxError, RouteNotFound
from loramux.http.asgi import App, Receive, Scope, Send, headers, request_state
from loramux.http.errors import refuse
from loramux.http.gate import Gate, gate_of
from loramux.http.keys import STRANGER, Caller
from loramux.http.rules import Need, need, replaced


class Authentication:
    """ASGI middleware: 401 without a key, 403 without the admin key; puts the `Caller` where routes find it."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            gate = gate_of(scope)
            needed = need(scope, protect_metrics=gate.protect_metrics)
            try:
                caller = identify(scope, gate, needed)
                request_state(scope)["loramux_caller"] = caller  # the log names who was refused, too
                authorise(scope, caller, needed)
            except LoramuxError as error:
                await refuse(scope, send, error)
                return
        await self.app(scope, receive, send)


def identify(scope: Scope, gate: Gate, needed: Need) -> Caller:
    """Who is calling. Raises InvalidApiKey if that must be known and is not."""
    presented, anonymous = _presented(scope), gate.keys.anonymous
    caller = gate.keys.identify(presented) if presented is not None else None
    if caller is not None:
        return caller
    if needed is Need.OPEN:
        return anonymous or STRANGER
    # A key that is nobody's passes where none is needed: there are clients that always send one.
    if anonymous is not None and (anonymous.admin or needed is Need.KEY):
        return anonymous
    raise InvalidApiKey("This needs a key." if presented is None else "The key is not one of this server's.")


def authorise(scope: Scope, caller: Caller, needed: Need) -> None:
    """Raises AdminKeyRequired, RouteNotFound."""
    if needed is Need.ADMIN and not caller.admin:
        raise AdminKeyRequired("This needs the admin key.")
    if replaced(scope):
        raise RouteNotFound("Adapters are managed at /v1/adapters.")


def _presented(scope: Scope) -> str | None:
    """`Authorization: Bearer KEY`, else `X-Api-Key: KEY`. The first of each counts."""
    for value in headers(scope, b"authorization")[:1]:
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            return key.strip()
    return next((value.strip() for value in headers(scope, b"x-api-key")[:1] if value.strip()), None)
