"""An adapter card of the server (`GET /v1/adapters`) as lines for a person."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loramux.cli.terminal import printable, table
from loramux.units import format_bytes

_HEADS = ("name", "state", "version", "method", "rank", "size", "leases", "pinned")


def listing(cards: Sequence[Mapping[str, Any]], memory: Mapping[str, Any] | None) -> Iterator[str]:
    """A table, the reasons of those that failed, and how full adapter memory is."""
    if cards:
        yield from table([_HEADS, *(_row(card) for card in cards)])
    else:
        yield "No adapters. Add one: loramux adapters add NAME PATH"
    for card in cards:
        if error := card.get("error"):
            yield from _error(error, f"{_text(card['name'])}: ")
    if memory:
        yield (
            f"{memory['resident']} resident, {format_bytes(memory['used_bytes'])} of "
            f"{format_bytes(memory['capacity_bytes'])} in use"
        )


def details(card: Mapping[str, Any]) -> Iterator[str]:
    """Everything about one adapter."""
    rows = [
        ("name", _text(card["name"])),
        ("state", _state(card)),
        ("version", _text(card["version"])),
        ("previous", _text(card.get("previous"))),
        ("method", _text(card["method"])),
        ("rank", _text(card["rank"])),
        ("experts", _text(card.get("experts"))),
        ("posterior", "yes" if card.get("bayesian") else "no"),
        ("pinned", "yes" if card["pinned"] else "no"),
        ("leases", _text(card["leases"])),
        ("size", format_bytes(card["resident_bytes"])),
        ("loaded in", _stages(card.get("load_seconds") or {})),
        ("last used", _ago(card.get("last_used"))),
        *(("confidence", f"{_text(one['method'])} of {_text(one['n'])}") for one in card.get("calibrations") or ()),
        *(("warning", _text(warning)) for warning in card.get("warnings") or ()),
    ]
    for name, value in rows:
        yield f"{name:<10}{value}"
    if error := card.get("error"):
        yield from _error(error, "error     ")


def summary(card: Mapping[str, Any]) -> str:
    """One line after a change."""
    facts = [f"{_text(card['name'])} is {_text(card['state'])}"]
    if card["version"]:
        facts.append(f"version {_text(card['version'])}")
    if card["method"]:
        facts.append(f"{_text(card['method'])} of rank {_text(card['rank'])}")
    if card["resident_bytes"]:
        facts.append(format_bytes(card["resident_bytes"]))
    if card["pinned"]:
        facts.append("pinned")
    return ", ".join(facts)


def _row(card: Mapping[str, Any]) -> tuple[str, ...]:
    size = format_bytes(card["resident_bytes"]) if card["resident_bytes"] else "-"
    cells = (_text(card[key]) for key in ("version", "method", "rank"))
    return (_text(card["name"]), _state(card), *cells, size, _text(card["leases"]), "yes" if card["pinned"] else "no")


def _state(card: Mapping[str, Any]) -> str:
    """Of the version that serves, and of the one that is to replace it."""
    return f"{_text(card['state'])}, next {_text(card['pending'])}" if card.get("pending") else _text(card["state"])


def _error(error: Mapping[str, Any], before: str) -> Iterator[str]:
    yield f"{before}{_text(error['message'])} ({_text(error['code'])})"
    if error.get("hint"):
        yield f"{' ' * len(before)}{_text(error['hint'])}"


def _stages(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return "-"
    parts = ", ".join(f"{_text(stage)} {value:.2f}" for stage, value in seconds.items())
    return f"{sum(seconds.values()):.2f} s ({parts})"


def _ago(when: float | None) -> str:
    return "never" if when is None else f"{max(0.0, time.time() - when):.0f} s ago"


def _text(value: Any) -> str:
    return "-" if value is None else printable(str(value))
