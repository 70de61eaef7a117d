"""`POST /v1/uncertainty/score`: a completion request whose answer is there already, and is to be scored.

    {"model": NAME, "messages": […] or "prompt": TEXT, "completion": TEXT, "uncertainty": {"samples": 8}}

It goes on as the completion request that it is, so that all rules about those hold for it; `uncertainty.py` knows by
`is_scored` that nothing is to be written.
"""

from __future__ import annotations

import json

from loramux.errors import InvalidRequest
from loramux.http.asgi import App, Receive, Scope, Send, read_body, replayed, request_state, route_path
from loramux.http.errors import refuse

PATH = "/v1/uncertainty/score"
_HINT = 'Send {"model": NAME, "messages": […], "completion": TEXT}.'
_STATE = "loramux_scored"


class ScoredCompletion:
    """ASGI middleware outside of all that reads completion requests."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or route_path(scope) != PATH:
            await self.app(scope, receive, send)
        elif (body := await read_body(receive)) is not None:
            try:
                path = scope["path"].removesuffix(PATH) + _path_of(body)
            except InvalidRequest as error:
                await refuse(scope, send, error)
                return
            request_state(scope)[_STATE] = True
            await self.app({**scope, "path": path, "raw_path": path.encode()}, replayed(body, receive), send)


def is_scored(scope: Scope) -> bool:
    """Whether this completion request came to `PATH`."""
    return bool(request_state(scope).get(_STATE))


def _path_of(body: bytes) -> str:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise InvalidRequest("The body must be a JSON object.", hint=_HINT)
    if not isinstance(request.get("completion"), str) or not request["completion"]:
        raise InvalidRequest("`completion` must be a text.", hint=_HINT, param="completion")
    if ("messages" in request) == ("prompt" in request):
        raise InvalidRequest("There must be either `messages` or a `prompt`.", hint=_HINT, param="messages")
    for field in ("stream", "n", "logprobs", "echo"):
        if request.get(field):
            raise InvalidRequest(f"`{field}` is for answers that are still to be written.", hint=_HINT, param=field)
    return "/v1/chat/completions" if "messages" in request else "/v1/completions"
