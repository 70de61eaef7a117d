"""What the middleware goes by. It travels on vLLM's namespace, because vLLM makes middleware without arguments."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field

from loramux.config import MAX_BODY
from loramux.http.asgi import Scope
from loramux.http.keys import KeyRing

_ATTRIBUTE = "loramux_gate"


@dataclass(frozen=True)
class Gate:
    """Who may come in, with how much, and what is written down about it."""

    keys: KeyRing = field(default_factory=KeyRing)
    bases: tuple[str, ...] = ()  # names of the base model
    protect_metrics: bool = False
    max_body: int = MAX_BODY  # bytes
    access_log: bool = True
    unlogged: frozenset[str] = frozenset()  # paths that are not worth a line of the access log


def install(args: Namespace, gate: Gate) -> None:
    """Let `gate_of` find the gate in every app that vLLM builds from `args`."""
    setattr(args, _ATTRIBUTE, gate)


def gate_of(scope: Scope) -> Gate:
    """The gate of the app this request is for. Raises RuntimeError without one: nothing is served unguarded."""
    args = getattr(scope["app"].state, "args", None)
    gate = getattr(args, _ATTRIBUTE, None)
    if not isinstance(gate, Gate):
        raise RuntimeError("the app has no gate: it was not started by `loramux serve`")
    return gate
