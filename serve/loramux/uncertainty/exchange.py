"""What the HTTP side and the engine side of a request for an uncertainty tell each other."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from loramux.uncertainty.ask import Ask, Mode
from loramux.uncertainty.recent import Scored


@dataclass(eq=False)
class Exchange:
    """One request's. The engine side fills `choices`, before the end of each choice is passed on."""

    ask: Ask
    mode: Mode
    samples: int
    labels: tuple[tuple[int, ...], ...] = ()  # tokens of the ask's labels
    text: str | None = None  # an answer that was written elsewhere, to be scored
    given: tuple[int, ...] = ()  # its tokens
    greedy: bool = False  # the draws of `sample` write their most probable tokens
    choices: dict[int, dict[str, Any]] = field(default_factory=dict)  # the field `uncertainty` of each
    scored: dict[int, Scored] = field(default_factory=dict)  # those of the choices that feedback may be given on
    tokens: int = 0  # read beyond those of the answer itself


#: Set while a request that asks for an uncertainty is carried out.
exchange: ContextVar[Exchange | None] = ContextVar("loramux_uncertainty", default=None)
