"""`"uncertainty": {…}` in a request: what it may ask for.

mode            score: S draws of the weights read the answer that the mean gave
                decide: S draws choose between `labels`; the answer is the most probable one
                sample: `samples` choices, each written under a draw of its own
                fast: entropy and likelihood of the answer as it was written, no draws
                off; left out: score for a Bayesian adapter, else fast
samples         draws, 2 to 64; 8 if left out; "auto": as many as it takes to tell whether to abstain (`adaptive.py`)
max_samples     of "auto", the most; 8 if left out
seed            of the draws; 0 if left out, and scores are comparable only for one seed
noise           "sequence", the only one: one draw is one set of weights for the whole sequence
scores          names; all if left out
per_token       total, aleatoric and epistemic of every token too
labels          of decide: texts
on_unsupported  for an adapter without a posterior: "fast" (what can be told without draws) or "error"
timeout_ms      how long an answer may wait for its scores; then they are `partial`
alpha           of decide, where it is calibrated: the prediction set misses the right label at most so often
calibrated      false: scores as they are, even if the version is calibrated (`calibration/`)
abstain_above   what becomes of an answer that is not sure (`abstain.py`); abstain_below likewise
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from loramux.errors import AdapterNotBayesian, InvalidRequest
from loramux.registry.draws import MAX_SAMPLES
from loramux.uncertainty.abstain import ABOVE, BELOW, SURE, Action, Rule
from loramux.uncertainty.scores import FAST_SCORES, LABEL_SCORES, SEQUENCE_SCORES

FIELD = "uncertainty"
MIN_SAMPLES = 2
MAX_LABELS = 64
_LONGEST_LABEL = 256
_MAX_TIMEOUT_MS = 600_000
_MAX_VALUE = 1e300
_MAX_SEED = 2**63 - 1


class Mode(StrEnum):
    SCORE = "score"
    DECIDE = "decide"
    SAMPLE = "sample"
    FAST = "fast"


SCORES: dict[Mode, tuple[str, ...]] = {
    Mode.SCORE: SEQUENCE_SCORES,
    Mode.DECIDE: LABEL_SCORES,
    Mode.SAMPLE: ("agreement", "semantic_entropy", "clusters"),
    Mode.FAST: FAST_SCORES,
}


@dataclass(frozen=True)
class Ask:
    """A well-formed request for an uncertainty. `mode` is None if it is up to the adapter."""

    mode: Mode | None = None
    samples: int | None = None
    seed: int = 0
    scores: tuple[str, ...] | None = None
    per_token: bool = False
    labels: tuple[str, ...] = ()
    fast_if_unsupported: bool = True
    timeout_s: float | None = None
    abstain: Rule | None = None
    alpha: float | None = None
    calibrated: bool = True
    adaptive: bool = False  # `samples` is the most


def parse(value: Any) -> Ask | None:
    """The field's value as an Ask; None if nothing is asked for. Raises InvalidRequest, which names the field."""
    if value is None or value is False:
        return None
    if value is True:
        return Ask()
    if not isinstance(value, dict):
        raise _invalid("must be an object", 'Send "uncertainty": {"mode": "score", "samples": 8}.')
    unknown = sorted(set(value) - set(_FIELDS))
    if unknown:
        raise _invalid(f"has no {unknown[0][:64]!r}", f"Its fields are {', '.join(_FIELDS)}.", unknown[0][:64])
    given = {name: item for name, item in value.items() if item is not None}
    if given.get("mode") == "off":
        return None
    named = _one_of(given, "mode", [*Mode, "off"])
    mode = Mode(named) if named else None
    if given.get("noise", "sequence") != "sequence":
        raise _invalid('can only be "sequence"', "Leave it out: one draw is one set of weights.", "noise")
    timeout = _whole(given, "timeout_ms", 1, _MAX_TIMEOUT_MS)
    adaptive, samples = _samples(given, mode)
    return Ask(
        mode=mode,
        samples=samples,
        adaptive=adaptive,
        seed=_whole(given, "seed", 0, _MAX_SEED) or 0,
        scores=_scores(given, mode),
        per_token=_flag(given, "per_token", False),
        labels=_labels(given, mode),
        fast_if_unsupported=_one_of(given, "on_unsupported", ["fast", "error"]) != "error",
        timeout_s=None if timeout is None else timeout / 1000,
        abstain=_rule(given, mode),
        alpha=_alpha(given, mode),
        calibrated=_flag(given, "calibrated", True),
    )


def resolve(ask: Ask, *, bayesian: bool) -> Mode:
    """The mode that answers. Raises AdapterNotBayesian if that would need draws, and the request wants no other."""
    if bayesian:
        return ask.mode or Mode.SCORE
    if ask.mode in (None, Mode.FAST):
        return Mode.FAST
    if not ask.fast_if_unsupported:
        raise AdapterNotBayesian(
            f"What answers has no posterior to draw from, which the mode {ask.mode.value!r} needs.",
            hint='Name a Bayesian adapter (GET /v1/adapters: "bayesian"), or send "on_unsupported": "fast".',
            param="model",
        )
    # One set of weights can decide and be sampled from; there is only nothing for draws to disagree on.
    return Mode.FAST if ask.mode is Mode.SCORE else ask.mode


_FIELDS = (
    "mode",
    "samples",
    "max_samples",
    "seed",
    "noise",
    "scores",
    "per_token",
    "labels",
    "on_unsupported",
    "timeout_ms",
    "alpha",
    "calibrated",
    ABOVE,
    BELOW,
)


def _whole(given: dict[str, Any], name: str, least: int, most: int) -> int | None:
    value = given.get(name)
    if value is not None and not (type(value) is int and least <= value <= most):
        raise _invalid(f"must be a whole number from {least} to {most}", _LEAVE_OUT, name)
    return value


def _samples(given: dict[str, Any], mode: Mode | None) -> tuple[bool, int | None]:
    """Whether their number is up to the answer; and how many, or how many at most."""
    if given.get("samples") != "auto":
        if "max_samples" in given:
            raise _invalid('belongs to "samples": "auto"', "Leave it out.", "max_samples")
        return False, _whole(given, "samples", MIN_SAMPLES, MAX_SAMPLES)
    if mode in (Mode.SAMPLE, Mode.FAST):
        raise _invalid("must be a number, or left out, in this mode", _LEAVE_OUT, "samples")
    if not {ABOVE, BELOW} & set(given):
        raise _invalid(
            f'can be "auto" where there is something to decide: {ABOVE} or {BELOW}', "Send one, or a number.", "samples"
        )
    return True, _whole(given, "max_samples", MIN_SAMPLES, MAX_SAMPLES)


def _flag(given: dict[str, Any], name: str, default: bool) -> bool:
    if not isinstance(value := given.get(name, default), bool):
        raise _invalid("must be true or false", _LEAVE_OUT, name)
    return value


def _alpha(given: dict[str, Any], mode: Mode | None) -> float | None:
    value = given.get("alpha")
    if value is None:
        return None
    if mode is not Mode.DECIDE:
        raise _invalid('belongs to the mode "decide"', "Leave it out: a prediction set is one of labels.", "alpha")
    if not is_share(value):
        raise _invalid("must be a number between 0 and 1", 'Send "alpha": 0.1.', "alpha")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether it is a finite number. Compared as it is: an integer may be too large for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_VALUE


def is_share(value: Any) -> bool:
    """Whether it is a number between 0 and 1, the ends left out."""
    return is_number(value) and 0 < value < 1


def _one_of(given: dict[str, Any], name: str, values: Sequence[str], within: str = "") -> str | None:
    if name in given and given[name] not in values:
        param = f"{within}.{name}" if within else name
        raise _invalid(f"must be one of {', '.join(values)}", _LEAVE_OUT, param)
    return given.get(name)


def _scores(given: dict[str, Any], mode: Mode | None) -> tuple[str, ...] | None:
    if "scores" not in given:
        return None
    known = _known(mode)
    names = given["scores"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _invalid("must be a list of names", f"There are {', '.join(known)}.", "scores")
    for name in names:
        if name not in known:
            raise _invalid(f"has no {name[:64]!r}", f"There are {', '.join(known)}.", "scores")
    rule = given.get(ABOVE) or given.get(BELOW)
    needed = rule.get("score") if isinstance(rule, dict) else None
    return tuple(names) if needed is None or needed in names else (*names, needed)


def _labels(given: dict[str, Any], mode: Mode | None) -> tuple[str, ...]:
    if (mode is Mode.DECIDE) != ("labels" in given):
        raise _invalid('belongs to the mode "decide"', 'Send "mode": "decide", "labels": ["yes", "no"].', "labels")
    labels = given.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise _invalid("must be a list of texts", 'Send "labels": ["yes", "no"].', "labels")
    if mode is Mode.DECIDE and not 2 <= len(labels) <= MAX_LABELS:
        raise _invalid(f"must be 2 to {MAX_LABELS}", "Give the labels to choose between.", "labels")
    for place, label in enumerate(labels):
        if not 0 < len(label) <= _LONGEST_LABEL:
            raise _invalid(
                f"must have 1 to {_LONGEST_LABEL} characters", "Leave it out or shorten it.", f"labels[{place}]"
            )
        if label in labels[:place]:
            raise _invalid("is there twice", "Give every label once.", f"labels[{place}]")
    return tuple(labels)


def _rule(given: dict[str, Any], mode: Mode | None) -> Rule | None:
    names = [name for name in (ABOVE, BELOW) if name in given]
    if not names:
        return None
    name, rule = names[0], given[names[0]]
    if len(names) > 1:
        raise _invalid("excludes the other threshold", "Send one of the two.", name)
    hint = f'Send "{name}": {{"score": NAME, "value": NUMBER, "action": "flag", "refuse" or "route"}}.'
    if not isinstance(rule, dict) or not {"score", "value"} <= set(rule) <= {"score", "value", "action", "route_to"}:
        raise _invalid("must have a `score` and a `value`, may have an `action` and a `route_to`", hint, name)
    known = [score for score in _known(mode) if (score in SURE) == (name == BELOW)]
    if rule["score"] not in known:
        raise _invalid("has no such score", f"There are {', '.join(known)}.", f"{name}.score")
    value = rule["value"]
    if not is_number(value):
        raise _invalid("must be a number", hint, f"{name}.value")
    action = _one_of(rule, "action", [*Action], within=name) or Action.FLAG
    route_to = rule.get("route_to")
    if (action == Action.ROUTE) != isinstance(route_to, str) or route_to == "":
        raise _invalid('belongs to "action": "route", and is a model\'s name', hint, f"{name}.route_to")
    return Rule(rule["score"], float(value), name == BELOW, Action(action), route_to)


def _known(mode: Mode | None) -> tuple[str, ...]:
    return SCORES[mode] if mode else tuple(dict.fromkeys([*SEQUENCE_SCORES, *FAST_SCORES]))


_LEAVE_OUT = "Leave it out for the default."


def _invalid(what: str, hint: str, name: str = "") -> InvalidRequest:
    param = f"{FIELD}.{name}" if name else FIELD
    return InvalidRequest(f"`{param}` {what}.", hint=hint, param=param)
