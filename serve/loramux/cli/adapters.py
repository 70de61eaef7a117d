"""`loramux adapters`: look at adapters without a server, a GPU or vLLM."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramux.bases import DEFAULT_BASE
from loramux.cli import adapter_report
from loramux.cli.base import load_base
from loramux.console import say
from loramux.errors import LoramuxError
from loramux_adapters import AdapterError, LoweredAdapter, lower
from loramux_adapters.abilities import Abilities
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS, find_method
from loramux_adapters.methods.native import Native, read_file
from loramux_adapters.verify import check_values


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 for an adapter that was read and, with `check`, can be served; 1 otherwise."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["compose"]:
        from loramux.cli.compose import main as compose

        return compose(argv[1:])
    options = _parser().parse_args(argv)
    if options.command == "methods":
        say(*_methods(options.json))
        return 0
    try:
        adapter, made_for, checked_on = _load(options.path, options.base, needs_base=options.command == "check")
    except AdapterError as error:
        refused = adapter_report.refusal(error)
        say(*([_dump(refused)] if options.json else adapter_report.refusal_lines(error)))
        return 1
    except LoramuxError as error:
        sys.stderr.write(f"loramux adapters: {error}\n")
        return 1
    found = adapter_report.report(adapter, made_for=made_for, checked_on=checked_on)
    say(*([_dump(found)] if options.json else adapter_report.lines(found)))
    return 0 if found["servable"] or options.command == "show" else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loramux adapters", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "check": "say whether an adapter fits a base model and can be served; exit status 1 if not",
        "show": "say what an adapter is; native files need no base model for that",
    }.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", type=Path, metavar="PATH", help="the adapter's folder, or a native file")
        command.add_argument("--base", metavar="BASE", help=f"a folder or a name (default: {DEFAULT_BASE})")
        command.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    commands.add_parser("compose", help="make one adapter out of several: loramux adapters compose --help")
    methods = commands.add_parser("methods", help="list the kinds of adapters and what each can do")
    methods.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    return parser


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


def _methods(as_json: bool) -> list[str]:
    rows = [{"name": method.name, **vars(method.abilities)} for method in METHODS]
    if as_json:
        return [_dump(rows)]
    heads = ("method", "read", "write", "serve", "exact", "router")
    table = [heads, *(_row(method.name, method.abilities) for method in METHODS)]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _row(name: str, can: Abilities) -> tuple[str, ...]:
    def word(value: bool | str) -> str:
        return value if isinstance(value, str) else "yes" if value else "no"

    return (name, can.read, word(can.write), word(can.serve), word(can.exact), can.router)


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2)
