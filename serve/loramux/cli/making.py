"""What commands share that make an adapter: their frame, the options of what is read and written, words for errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loramux.bases import DEFAULT_BASE
from loramux.cli.terminal import show
from loramux.console import note
from loramux.errors import ConfigError, LoramuxError
from loramux_adapters import AdapterError

Report = dict[str, Any]


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    make: Callable[[argparse.Namespace], Report],
    rows: Callable[[Report], Iterable[tuple[str, str]]],
) -> int:
    """Make an adapter and tell of it, by `--json` all of the report, else its rows; 1 if something is refused.

    The parser has the options of `add_output`; that their file may be written is checked before anything is made.
    """
    options = parser.parse_args(argv)
    try:
        _check_out(options.out, force=options.force)
        report = {"out": str(options.out), **make(options)}
    except (AdapterError, LoramuxError, OSError) as error:
        note(f"{parser.prog}: {error}")
        return 1
    show(report, (f"{name:<11}{value}" for name, value in rows(report)), as_json=options.json)
    return 0


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """The adapter that another is made of, and its base."""
    parser.add_argument("path", type=Path, metavar="PATH", help="the adapter's folder, or a native file")
    parser.add_argument(
        "--base", default=DEFAULT_BASE, metavar="BASE", help=f"folder or name (default: {DEFAULT_BASE})"
    )


def add_output(parser: argparse.ArgumentParser, *, details: str, folders: bool = False) -> None:
    """`details`: what the JSON has beyond the lines. `folders`: it may be a folder, as PEFT writes one, as well."""
    if folders:
        place = "a native file if it ends in .safetensors; else a folder, as PEFT writes one"
        parser.add_argument("--out", required=True, type=Path, metavar="PLACE", help=place)
    else:
        parser.add_argument("--out", required=True, type=_native_path, metavar="FILE.safetensors", help="what to write")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--json", action="store_true", help=f"JSON, with {details}, instead of lines")


def summary(errors: Mapping[str, float]) -> Report:
    """The mean of the modules' errors, the largest, and where that is."""
    where = max(errors, key=lambda module: errors[module])
    return {"mean": sum(errors.values()) / len(errors), "max": errors[where], "where": where}


def span(error: Mapping[str, Any]) -> str:
    """A summary in words."""
    return f"{error['mean']:.3g} in the mean, up to {error['max']:.3g} ({error['where']})"


def _check_out(path: Path, *, force: bool) -> None:
    """Raises ConfigError where an adapter cannot be written without more words."""
    if path.exists() and not force:
        raise ConfigError(f"There is {path} already.", hint="Name another, or overwrite it with --force.")
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent}.", hint="Make it, or name another.")


def _native_path(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".safetensors":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .safetensors")
    return path
