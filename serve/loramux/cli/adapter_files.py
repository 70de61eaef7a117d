"""`loramux adapters check`, `show PATH` and `methods`: without a server, a GPU or vLLM."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from loramux.bases import DEFAULT_BASE
from loramux.cli import adapter_report
from loramux.cli.base import load_base
from loramux.cli.terminal import show, table
from loramux.console import note, say
from loramux.errors import LoramuxError
from loramux_adapters import AdapterError, LoweredAdapter, lower, matrix
from loramux_adapters.abilities import Layout
from loramux_adapters.detect import find_layout, find_method
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS
from loramux_adapters.methods.native import Native, read_file
from loramux_adapters.verify import check_values


def inspect(options: argparse.Namespace) -> int:
    """Exit status: 0 for an adapter that was read and, with `check`, can be served; 1 otherwise."""
    layout: Layout | None = None
    try:
        layout = find_layout(AdapterFolder(Path(options.path)))
        adapter, made_for, checked_on = _load(Path(options.path), options.base, needs_base=options.command == "check")
    except AdapterError as error:
        refused = adapter_report.refusal(error, layout)
        show(refused, adapter_report.refusal_lines(error, layout), as_json=options.json)
        return 1
    except LoramuxError as error:
        note(f"loramux adapters: {error}")
        return 1
    found = adapter_report.report(adapter, layout, made_for=made_for, checked_on=checked_on)
    show(found, adapter_report.lines(found), as_json=options.json)
    return 0 if found["servable"] or options.command == "show" else 1


def methods(options: argparse.Namespace) -> int:
    """List the kinds of adapters."""
    if options.json:
        say(json.dumps(matrix.data(), indent=2))
        return 0
    rows = [matrix.cells(method.name, method.abilities) for method in METHODS]
    say(*table([matrix.HEADS, *([cell.partition(":")[0] for cell in row] for row in rows)]))
    for method, row in zip(METHODS, rows, strict=True):
        layouts = [f"{layout}: {layout.sign}" for layout in method.abilities.layouts]
        words = [f"{head}: {cell}" for head, cell in zip(matrix.HEADS, row, strict=True) if ": " in cell]
        say("", method.name, *(f"    {line.replace('`', '')}" for line in (*layouts, *words)))
    return 0


def _load(path: Path, base: str | None, *, needs_base: bool) -> tuple[LoweredAdapter, str | None, str | None]:
    """The adapter, the base that it names if it is native, and the base that it was checked on if there was one."""
    if needs_base or base is not None:
        return _on_base(path, base)
    folder = AdapterFolder(path)
    if find_method(folder).name != Native.name:
        return _on_base(path, None)
    native = read_file(folder)
    check_values(native.adapter)
    return native.adapter, native.base, None


def _on_base(path: Path, base: str | None) -> tuple[LoweredAdapter, str | None, str | None]:
    model = load_base(base or DEFAULT_BASE)
    return lower(path, model), None, model.name
