"""A key with an allow-list reaches its adapters, the base, and nothing else; other adapters do not exist for it."""

from __future__ import annotations

import json
from typing import Any

from loramux.errors import AdapterNotFound, InvalidRequest, LoramuxError, RouteNotAllowed
from loramux.http.asgi import App, Message, Receive, Scope, Send, read_body, replayed, request_state, route_path
from loramux.http.errors import refuse
from loramux.http.gate import gate_of
from loramux.http.keys import Caller
from loramux.http.parts import wish_in
from loramux.http.rules import COMPLETIONS, READ, Need, need

# These and COMPLETIONS are all that such a key reaches: vLLM has many more routes, which may name a model in ways not
# known here.
_MODEL_IN_PATH = ("/v1/models/", "/v1/adapters/")
_FEEDBACK = "/v1/uncertainty/feedback"  # finds no answers but those of its adapters
_WITHOUT_MODEL = frozenset({"/v1/models", "/v1/adapters", "/version", "/openapi.json", "/docs", "/redoc"})


class ModelAccess:
    """ASGI middleware inside `Authentication` and `BodyLimit`; requests of unrestricted callers pass untouched."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        caller: Caller = request_state(scope)["loramux_caller"]
        gate = gate_of(scope)
        if not caller.restricted or need(scope, protect_metrics=gate.protect_metrics) is Need.OPEN:
            await self.app(scope, receive, send)
            return
        try:
            named, wish = _place_of_model(scope), None
            if named is _BODY:
                body = await read_body(receive)
                if body is None:
                    return  # the client left
                receive = replayed(body, receive)
                request = _object_in(body)
                named, wish = request.get("model"), wish_in(request)
            if named:
                _check([named], gate.bases, caller, not_found(named))
            if wish is not None:
                names = [part.name for part in wish.parts]
                _check(names, gate.bases, caller, _no_such_parts(names))
                send = _UniformNotFound(scope, send, _no_such_parts(names))
            elif named:
                send = _UniformNotFound(scope, send, not_found(named))
        except LoramuxError as error:
            await refuse(scope, send, error)
            return
        await self.app(scope, receive, send)


_BODY = object()


def _place_of_model(scope: Scope) -> Any:
    """The model the path names, `_BODY` if the body does, None if nothing must. Raises RouteNotAllowed."""
    path = route_path(scope)
    # Routers drop a newline at the end of a path, and what is checked must be what is read.
    method = scope["method"] if scope["type"] == "http" and path.isprintable() else None
    if method in READ:
        if path in _WITHOUT_MODEL:
            return None
        for prefix in _MODEL_IN_PATH:
            if path.startswith(prefix) and len(path) > len(prefix):
                return path[len(prefix) :]
    if method == "POST" and path in COMPLETIONS:
        return _BODY
    if method == "POST" and path == _FEEDBACK:
        return None
    raise RouteNotAllowed("This key may only list and use its adapters.")


def _object_in(body: bytes) -> dict[str, Any]:
    """The body. Its `model` is text, or there is none (the base answers): InvalidRequest if that is not certain.

    Parsed as the routes parse it. A second "model" is refused: which one counts is a matter of the parser.
    """
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the outermost object ends last
        return dict(found)

    try:
        value = json.loads(body, object_pairs_hook=keep)
    except (ValueError, RecursionError):
        raise InvalidRequest("The body is not JSON.") from None
    models = [model for key, model in pairs if key == "model"]
    if not isinstance(value, dict) or len(models) > 1:
        raise InvalidRequest("The body must be one JSON object with at most one `model`.", param="model")
    if not all(model is None or isinstance(model, str) for model in models):
        raise InvalidRequest("`model` must be text.", param="model")
    return value


def adapter_of(model: str, bases: tuple[str, ...]) -> str | None:
    """The adapter a spelling speaks of, None for the base. The registry reads spellings the same way (tested)."""
    if model in bases:
        return None
    name = model.partition("@")[0]
    prefix = next((f"{base}:" for base in bases if name.startswith(f"{base}:")), "")
    return name.removeprefix(prefix)


def _check(models: list[str], bases: tuple[str, ...], caller: Caller, error: AdapterNotFound) -> None:
    for model in models:
        adapter = adapter_of(model, bases)
        if adapter is not None and not caller.allows(adapter):
            raise error


def not_found(model: str, param: str = "model") -> AdapterNotFound:
    """Says the same of what there is not and of what is not for the caller."""
    return AdapterNotFound(
        f"The model {model[:200]!r} does not exist.", hint="GET /v1/models lists what is served.", param=param
    )


def _no_such_parts(names: list[str]) -> AdapterNotFound:
    """Does not say which: all that it tells is in the request."""
    return AdapterNotFound(
        f"Not all of these adapters exist: {', '.join(repr(name[:64]) for name in names)}.",
        hint="GET /v1/models lists what is served.",
        param="adapters",
    )


class _UniformNotFound:
    """A send that words every 404 alike: the registry's own names close matches, which may be another tenant's."""

    def __init__(self, scope: Scope, send: Send, error: AdapterNotFound) -> None:
        self._scope, self._send, self._error = scope, send, error
        self._found = True

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 404:
            self._found = False
            await refuse(self._scope, self._send, self._error)
        if self._found:
            await self._send(message)
