"""The body of `POST /v1/uncertainty/calibrate`, checked.

    {"model": NAME, "uncertainty": {"mode": "score", "samples": 8}, "data": [ITEM, …]}

model        the adapter: what its name means now, or NAME@DIGITS
uncertainty  mode, samples, seed and labels of the requests that are to be calibrated; as in those
data         labelled answers, of these kinds:
               {"prompt" or "messages", "label": TEXT}                              decide: asked now
               {"prompt" or "messages", "completion": TEXT, "correct": true}        score, fast: scored now
               {"uncertainty": {…}, "correct": true or "label": TEXT}               the field of an answer of before
               {"score": 0.41, "correct": true}                                     the score alone; all of this kind
from         "feedback" in place of data: the answers of late that feedback was given on
method       temperature (decide), platt or isotonic; left out: the one with the smallest Brier score
score        what platt and isotonic are functions of, and the threshold is one of; left out: nll_ln, of decide total
sets         of decide, how labels get into prediction sets: lac or aps
risk         the share of wrong answers that the threshold is to keep to; 0.1 if left out
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loramux.errors import InvalidRequest
from loramux.uncertainty.ask import FIELD, Ask, is_number, is_share, parse
from loramux.uncertainty.calibration.calibration import Method
from loramux.uncertainty.calibration.conformal import Sets
from loramux.uncertainty.calibration.items import MAX_ITEMS

_FIELDS = ("model", FIELD, "data", "from", "method", "score", "sets", "risk")
_SETTINGS = ("mode", "samples", "seed", "noise", "labels")
_RISK = 0.1
HINT = 'Send {"model": NAME, "data": [{"prompt": TEXT, "completion": TEXT, "correct": true}, …]}.'
_KINDS = (
    'An item is {"prompt" or "messages", "completion", "correct"}, in the mode "decide" {"prompt" or "messages", '
    '"label"}, or {"uncertainty", "correct" or "label"}, or {"score", "correct"}.'
)


@dataclass(frozen=True)
class Item:
    """One of three: a `request` for its scores, what was `told` of it, or the `score` itself. `right`: or its label."""

    right: bool | str
    request: dict[str, Any] | None = None
    told: dict[str, Any] | None = None
    score: float | None = None


@dataclass(frozen=True)
class Wish:
    model: str
    ask: Ask
    asked: dict[str, Any]  # the settings as they were sent
    items: list[Item] | None  # None: those of feedback
    method: Method | None
    score: str | None
    sets: Sets
    risk: float


def wish_in(value: dict[str, Any]) -> Wish:
    """Raises InvalidRequest, which names the field or the item."""
    if unknown := sorted(set(value) - set(_FIELDS)):
        raise _invalid(unknown[0][:64], "is not known", f"The fields are {', '.join(_FIELDS)}.")
    if not isinstance(value.get("model"), str) or not value["model"]:
        raise _invalid("model", "must be an adapter's name", HINT)
    ask, asked = _settings(value.get(FIELD))
    items = _items(value, ask)
    risk = value.get("risk", _RISK)
    if not is_share(risk):
        raise _invalid("risk", "must be a number between 0 and 1", "Leave it out for 0.1.")
    method, score = _one_of(value, "method", Method), value.get("score")
    if score is not None and not isinstance(score, str):
        raise _invalid("score", "must be the name of a score", "Leave it out for the default.")
    return Wish(value["model"], ask, asked, items, method, score, _one_of(value, "sets", Sets) or Sets.LAC, risk)


def _settings(value: Any) -> tuple[Ask, dict[str, Any]]:
    asked = {} if value is None or value is True else value
    if isinstance(asked, dict) and (other := sorted(set(asked) - set(_SETTINGS))):
        raise _invalid(f"{FIELD}.{other[0][:64]}", "is not calibrated", f"Send {', '.join(_SETTINGS)} alone.")
    ask = parse(asked)
    if ask is None:
        raise _invalid(f"{FIELD}.mode", "tells no score", 'Send "mode": "score".')
    return ask, asked


def _items(value: dict[str, Any], ask: Ask) -> list[Item] | None:
    if (source := value.get("from")) is not None:
        if source != "feedback" or "data" in value:
            raise _invalid("from", 'can only be "feedback", and excludes `data`', HINT)
        return None
    data = value.get("data")
    if not isinstance(data, list) or not 0 < len(data) <= MAX_ITEMS:
        raise _invalid("data", f"must be a list of 1 to {MAX_ITEMS} items", HINT)
    items = [_item(one, ask, f"data[{place}]") for place, one in enumerate(data)]
    if len({item.score is None for item in items}) > 1:
        raise _invalid("data", "has items that are a score alone, and others", "Send items of one kind.")
    return items


def _item(value: Any, ask: Ask, where: str) -> Item:
    if not isinstance(value, dict):
        raise _invalid(where, "must be an object", _KINDS)
    right, kind = _right(value, ask, where), set(value) - {"correct", "label"}
    if kind == {"score"}:
        if not is_number(score := value["score"]):
            raise _invalid(f"{where}.score", "must be a finite number", _KINDS)
        return Item(right, score=float(score))
    if kind == {FIELD}:
        if not isinstance(value[FIELD], dict):
            raise _invalid(f"{where}.{FIELD}", "must be the field of an answer", _KINDS)
        return Item(right, told=value[FIELD])
    wanted = {"completion"} if not ask.labels else set()
    if kind - {"prompt", "messages"} != wanted or len(kind & {"prompt", "messages"}) != 1:
        raise _invalid(where, "is of no kind that there is", _KINDS)
    return Item(right, request={name: value[name] for name in kind})


def _right(value: dict[str, Any], ask: Ask, where: str) -> bool | str:
    """Whether the answer was right; the right label, if it is a choice between labels."""
    known, field = set(value) & {"correct", "label"}, "correct"
    if ask.labels and set(value) != {"score", "correct"}:
        field = "label"
    if known != {field}:
        raise _invalid(f"{where}.{field}", "must be there, and not the other of label and correct", _KINDS)
    right = value[field]
    if field == "correct" and not isinstance(right, bool):
        raise _invalid(f"{where}.correct", "must be true or false", _KINDS)
    if field == "label" and right not in ask.labels:
        raise _invalid(f"{where}.label", "is none of the labels", f"They are {', '.join(map(repr, ask.labels))}.")
    return bool(right) if field == "correct" else str(right)


def _one_of(value: dict[str, Any], name: str, kind: Any) -> Any:
    if (found := value.get(name)) is None:
        return None
    if not isinstance(found, str) or found not in list(kind):
        raise _invalid(name, f"must be one of {', '.join(kind)}", "Leave it out for the default.")
    return kind(found)


def _invalid(param: str, what: str, hint: str) -> InvalidRequest:
    return InvalidRequest(f"`{param}` {what}.", hint=hint, param=param)
