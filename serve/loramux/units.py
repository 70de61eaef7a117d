"""Bytes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}}
_UNITS |= {f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}


def parse_bytes(text: str | int) -> int:
    """`"2GiB"`, `"1.5 GB"`, `"4096"` -> bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 512MiB or 2GiB")
    return int(Fraction(match[1]) * _UNITS[match[2].lower()])


def format_bytes(count: float) -> str:
    """Bytes -> `"1.50 GiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
