"""The fields of a completion request that ask for an adapter made of several.

    "adapters": [{"name": "spam", "weight": 0.7}, {"name": "med", "task": 2}, "news"]       their weighted sum
    "adapters": ["spam", "news"], "router": {"type": "arrow", "top_k": 1, "temperature": 0.5}      a mixture of them

A text is a part with nothing but a name, `"router": "arrow"` a router with its defaults. The options lie in an object
of their own because `top_k` and `temperature` beside `messages` are vLLM's, for sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from loramux.errors import InvalidRequest
from loramux.registry import Share
from loramux_adapters.compose.prepared import Router

PARTS, ROUTER = FIELDS = ("adapters", "router")
MAX_PARTS = 8
#: A larger weight, or a smaller one, is a mistake: a LoRA changes a few percent of what its layer computes.
MAX_WEIGHT, MIN_WEIGHT = 100.0, 1e-6
#: Beyond these a softmax is a maximum, or a mean.
MAX_TEMPERATURE, MIN_TEMPERATURE = 1000.0, 0.001
#: Arrow's own default, for as many parts or more.
TOP_K = 3
_LONGEST = 256
_MAX_TASK = 2**31  # more digits than that in an error would help nobody
_HINT = 'Send "adapters": [{"name": "NAME", "weight": 0.7}, …]; GET /v1/models lists the names.'
_ROUTER_HINT = 'Send "router": {"type": "arrow", "top_k": 2, "temperature": 1.0}, or "router": "arrow".'


class Wish(NamedTuple):
    """What a request asks for: the weighted sum of its parts, or a router over them, which have no weights then."""

    parts: list[Share]
    router: Router | None


def wish_in(request: Mapping[str, Any]) -> Wish | None:
    """What a request asks for; None if it does not. Raises InvalidRequest."""
    parts, router = request.get(PARTS), request.get(ROUTER)
    if parts is None:
        if router is not None:
            raise InvalidRequest("A `router` needs `adapters`, its parts.", hint=_HINT, param=PARTS)
        return None
    if not isinstance(parts, list) or not parts:
        raise InvalidRequest("`adapters` must be a list of one part or more.", hint=_HINT, param=PARTS)
    if len(parts) > MAX_PARTS:
        raise InvalidRequest(
            f"{len(parts)} parts are more than {MAX_PARTS}.",
            hint="Send fewer, or make one adapter of them and put it.",
            param=PARTS,
        )
    routed = router is not None
    shares = [_part(part, f"{PARTS}[{place}]", routed=routed) for place, part in enumerate(parts)]
    return Wish(shares, _router(router, len(shares)) if routed else None)


def names_in(value: Any) -> list[str] | None:
    """The names in `adapters`, as far as it is well-formed: for logs."""
    if not isinstance(value, list):
        return None
    names = [part.get("name") if isinstance(part, dict) else part for part in value[:MAX_PARTS]]
    return [name[:_LONGEST] for name in names if isinstance(name, str)]


def _part(part: Any, where: str, *, routed: bool) -> Share:
    if isinstance(part, str):
        part = {"name": part}
    if not isinstance(part, dict) or not {"name"} <= set(part) <= {"name", "weight", "task"}:
        raise InvalidRequest(
            f"{where} must have a `name`, may have a `weight` and a `task`, nothing else.", hint=_HINT, param=where
        )
    name, weight = part["name"], part.get("weight", 1.0)
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        raise InvalidRequest(f"The name must be text of 1 to {_LONGEST} characters.", hint=_HINT, param=f"{where}.name")
    if routed and "weight" in part:
        raise InvalidRequest(
            "A router weighs its parts itself.", hint="Leave the weights out.", param=f"{where}.weight"
        )
    if not _is_number(weight, MIN_WEIGHT, MAX_WEIGHT, signed=True):
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


def _router(value: Any, parts: int) -> Router:
    options = {"type": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or not {"type"} <= set(options) <= {"type", "top_k", "temperature"}:
        raise InvalidRequest(
            "The router must have a `type`, may have `top_k` and `temperature`, nothing else.",
            hint=_ROUTER_HINT,
            param=ROUTER,
        )
    if options["type"] != "arrow":
        raise InvalidRequest("There is one type of router, arrow.", hint=_ROUTER_HINT, param=f"{ROUTER}.type")
    if parts < 2:
        raise InvalidRequest(
            "A router chooses among two parts or more.", hint="Ask for a single one as `model`.", param=PARTS
        )
    top_k, temperature = options.get("top_k", min(TOP_K, parts)), options.get("temperature", 1.0)
    if type(top_k) is not int or not 1 <= top_k <= parts:
        raise InvalidRequest(
            f"top_k must be a whole number from 1 to {parts}: how many of the parts a token uses.",
            hint=_ROUTER_HINT,
            param=f"{ROUTER}.top_k",
        )
    if not _is_number(temperature, MIN_TEMPERATURE, MAX_TEMPERATURE):
        raise InvalidRequest(
            f"The router's temperature must be a number between {MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:g}.",
            hint="Leave it out for 1. That of sampling stands beside `router`.",
            param=f"{ROUTER}.temperature",
        )
    return Router(top_k, float(temperature))


def _is_number(value: Any, low: float, high: float, *, signed: bool = False) -> bool:
    """Is its size within these? Compared as it is: an integer may be too large for a float. NaN is in no range."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return low <= (abs(value) if signed else value) <= high
