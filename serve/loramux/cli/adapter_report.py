"""What `loramux adapters check` and `show` say about one adapter, as data and as lines."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from loramux.units import format_bytes
from loramux_adapters import AdapterError, LoweredAdapter, posterior_of, unserved
from loramux_adapters.abilities import Layout
from loramux_adapters.native import describe, digest_of


def report(adapter: LoweredAdapter, layout: Layout, *, made_for: str | None, checked_on: str | None) -> dict[str, Any]:
    """Everything `--json` prints. `made_for`: the base that a native file names; `checked_on`: the one at hand."""
    obstacles = unserved(adapter)
    return {
        "method": adapter.method,
        "layout": str(layout),
        "digest": digest_of(adapter),
        "base": {"made_for": made_for, "checked_on": checked_on},
        "sites": len(adapter.sites),
        "experts": adapter.experts,
        "ranks": adapter.ranks,
        "bytes": adapter.nbytes(),
        "dtype": adapter.dtype,
        "gates": describe(adapter)["gates"],
        "experts_by_gate": {name: gate.experts for name, gate in adapter.gates.items()},
        "scored_by_gate": {name: gate.scored for name, gate in adapter.gates.items()},
        "magnitudes": sum(site.magnitude is not None for site in adapter.sites.values()),
        "biases": sum(site.bias is not None for site in adapter.sites.values()),
        "bayesian": adapter.bayesian,
        "posterior": None if (posterior := posterior_of(adapter)) is None else asdict(posterior),
        "servable": not obstacles,
        "unserved": obstacles,
        "warnings": list(adapter.warnings),
    }


def refusal(error: AdapterError, layout: Layout | None) -> dict[str, Any]:
    """`layout`: what was recognised before it was refused, if anything was."""
    told = {"code": error.code, "field": error.field, "message": error.message, "hint": error.hint}
    return {"layout": None if layout is None else str(layout), "error": told}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The report for a person."""
    base = found["base"]
    rows = [
        ("method", found["method"]),
        ("layout", found["layout"]),
        ("base", f"fits {base['checked_on']}" if base["checked_on"] else f"{base['made_for']} (not checked)"),
        ("sites", str(found["sites"])),
        ("experts", _span(found["experts_by_gate"].values()) if found["gates"] else "1"),
        ("ranks", ", ".join(_ranks(found["ranks"]))),
        ("size", f"{format_bytes(found['bytes'])}, {found['dtype']}"),
        *(("gates", gate) for gate in _gates(found)),
        *_outputs(found["magnitudes"], found["biases"]),
        ("posterior", _posterior(found["posterior"])),
        ("digest", found["digest"][:16]),
        ("servable", "yes" if found["servable"] else f"no: {found['unserved'][0]}"),
        *(("", f"    {obstacle}") for obstacle in found["unserved"][1:4]),
        *(("warning", warning) for warning in found["warnings"]),
        *(("warning", warning) for warning in (found["posterior"] or {}).get("warnings", ())),
    ]
    if (more := len(found["unserved"]) - 4) > 0:
        rows.append(("", f"    and {more} more"))
    for name, value in rows:
        yield f"{name:<10}{value}"


def _posterior(posterior: Mapping[str, Any] | None) -> str:
    if posterior is None:
        return "no"
    draws = "" if posterior["samples"] is None else f"{posterior['samples']} draws, "
    return f"{posterior['family']} at {posterior['sites']} sites; {draws}{format_bytes(posterior['draw_bytes'])} a draw"


def _outputs(magnitudes: int, biases: int) -> Iterator[tuple[str, str]]:
    """What the adapter does beside its ranks, if anything: at how many sites it scales W0 x, and adds a bias."""
    if magnitudes or biases:
        yield "outputs", f"scaled at {magnitudes} sites, shifted at {biases}"


def refusal_lines(error: AdapterError, layout: Layout | None) -> Iterator[str]:
    if layout is not None:
        yield f"layout    {layout}"
    yield f"refused   {error.code}" + (f" ({error.field})" if error.field else "")
    yield f"          {error.message}"
    yield f"          {error.hint}"


def _ranks(ranks: Mapping[str, int]) -> Iterator[str]:
    """ "8", or "2..8" and then each run of layers with the same ranks: "layers 0-3: 2", "layers 4-7: 4..8"."""
    yield _span(ranks.values())
    if len(set(ranks.values())) == 1:
        return
    layers: dict[int, list[int]] = {}
    for module, rank in ranks.items():
        if (match := re.search(r"\.(\d+)\.", module)) is not None:
            layers.setdefault(int(match[1]), []).append(rank)
    spans = [(layer, _span(layers[layer])) for layer in sorted(layers)]
    for span, run in itertools.groupby(spans, key=lambda entry: entry[1]):
        numbers = [layer for layer, _ in run]
        yield f"layers {_span(numbers, '-')}: {span}" if len(numbers) > 1 else f"layer {numbers[0]}: {span}"


def _gates(found: Mapping[str, Any]) -> Iterator[str]:
    """One line for each different gate, with how many there are."""
    scored, experts = found["scored_by_gate"], found["experts_by_gate"]
    kinds = Counter(_gate(gate, scored[name], experts[name]) for name, gate in found["gates"].items())
    for kind, count in kinds.items():
        yield f"{count} × {kind}"


def _gate(gate: Mapping[str, Any], scored: int, experts: int) -> str:
    select = str(gate.get("select", "all"))
    argument = next((gate[name] for name in ("k", "p", "threshold", "tau_max") if name in gate), None)
    chosen = select if argument is None else f"{select} {argument}"
    rest = [f"{name} {gate[name]}" for name in ("source", "pre", "post", "norm", "value") if name in gate]
    if capacity := gate.get("capacity"):
        rest.append(f"at most {capacity['tokens']} tokens of a sequence each")
    shared = f" in {experts} groups" if experts < scored else ""
    return ", ".join([f"{gate.get('kind', 'token')}, {chosen} of {scored} experts{shared}", *rest])


def _span(values: Any, between: str = "..") -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}{between}{high}"
