"""`POST /v1/uncertainty/score`: a completion request whose answer is there already, and is to be scored.

    {"model": NAME, "messages": […] or "prompt": TEXT, "completion": TEXT, "uncertainty": {"samples": 8}}

It goes on as the completion request that it is, so that all rules about those hold for it; `uncertainty.py` knows by
`is_scored` that nothing is to be written.
"""

from __future__ import annotations

from typing import Any

from loramux.errors import InvalidRequest
from loramux.http.asgi import Receive, Scope, Send, json_object, request_state
from loramux.http.completions import OfPaths
from loramux.http.errors import refuse

PATH = "/v1/uncertainty/score"
_HINT = 'Send {"model": NAME, "messages": […], "completion": TEXT}.'
_STATE = "loramux_scored"


class ScoredCompletion(OfPaths):
    """ASGI middleware outside of all that reads completion requests."""

    paths = (PATH,)

    async def handle(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        try:
            path = scope["path"].removesuffix(PATH) + _path_of(json_object(body, _HINT))
        except InvalidRequest as error:
            await refuse(scope, send, error)
            return
        request_state(scope)[_STATE] = True
        await self.app({**scope, "path": path, "raw_path": path.encode()}, receive, send)


def is_scored(scope: Scope) -> bool:
    """Whether this completion request came to `PATH`."""
    return bool(request_state(scope).get(_STATE))


def _path_of(request: dict[str, Any]) -> str:
    if not isinstance(request.get("completion"), str) or not request["completion"]:
        raise InvalidRequest("`completion` must be a text.", hint=_HINT, param="completion")
    if ("messages" in request) == ("prompt" in request):
        raise InvalidRequest("There must be either `messages` or a `prompt`.", hint=_HINT, param="messages")
    for field in ("stream", "n", "logprobs", "echo"):
        if request.get(field):
            raise InvalidRequest(f"`{field}` is for answers that are still to be written.", hint=_HINT, param=field)
    return "/v1/chat/completions" if "messages" in request else "/v1/completions"
