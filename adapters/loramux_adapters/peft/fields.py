"""Numbers, flags and words of adapter_config.json that are a method's own."""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from loramux_adapters.errors import AdapterConfigInvalid, shown

Choice = TypeVar("Choice", bound=StrEnum)


def number(
    raw: Mapping[str, Any],
    field: str,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    least: float = -math.inf,
    default: float | None = None,
) -> float:
    """A number of sensible size. Raises AdapterConfigInvalid unless it is above, below and at least these."""
    value: Any = raw.get(field)
    if value is None and default is not None:
        return default
    if type(value) in (int, float) and abs(value) <= 1e30 and above < value < below and value >= least:
        return float(value)
    bounds = (("above", above), ("below", below), ("at least", least))
    rule = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
    raise _invalid(field, value, f"a number {rule}".rstrip())


def flag(raw: Mapping[str, Any], field: str, *, default: bool) -> bool:
    """True or false. Raises AdapterConfigInvalid for anything else."""
    value = raw.get(field)
    if not isinstance(value, bool | None):
        raise _invalid(field, value, "true or false")
    return default if value is None else value


def choice(raw: Mapping[str, Any], field: str, kind: type[Choice], default: Choice) -> Choice:
    """One of several words. Raises AdapterConfigInvalid for any other."""
    value = raw.get(field)
    if value is None:
        return default
    if value not in list(kind):
        raise _invalid(field, value, f"one of {', '.join(kind)}")
    return kind(value)


def _invalid(field: str, value: Any, rule: str) -> AdapterConfigInvalid:
    return AdapterConfigInvalid(
        f"adapter_config.json: {field} must be {rule}, not {shown(value)}.",
        hint="Give it as it was in training.",
        field=field,
    )
