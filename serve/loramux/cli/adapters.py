"""`loramux adapters`: look at adapters here, and manage those of a running server."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from loramux.bases import DEFAULT_BASE
from loramux.cli import calibrate
from loramux.cli.client import add_options, as_json
from loramux.config import ADAPTER_NAME
from loramux.console import note, say
from loramux.errors import LoramuxError

_WAIT_S = 120.0
_NAMED = {
    "rm": "withdraw an adapter; its running requests finish",
    "pin": "keep an adapter in memory whatever else is needed there",
    "unpin": "let an adapter make room for others again",
    "rollback": "go back to the version before this one",
}
# Those that write an adapter, each a module with a parser of its own, imported when it is called: all need torch.
_MAKING = {
    "bayesianize": "give an adapter a posterior without training",
    "compact": "make an adapter smaller",
    "compose": "make one adapter out of several",
    "extract": "make an adapter out of merged weights",
    "mean": "write a Bayesian adapter without its posterior",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done (with `check`: can be served), 1 refused, 2 for a malformed command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in _MAKING:
        made: int = import_module(f"loramux.cli.{argv[0]}").main(argv[1:])
        return made
    options = _parser().parse_args(argv)
    if options.command in ("check", "methods") or (options.command == "show" and _is_local(options)):
        from loramux.cli import adapter_files  # torch takes 2 s to import, and the others need none of it

        return adapter_files.methods(options) if options.command == "methods" else adapter_files.inspect(options)
    from loramux.cli import adapter_server

    try:
        return adapter_server.run(options)
    except LoramuxError as error:
        if options.json:
            say(json.dumps(as_json(error), indent=2))
        else:
            hint = f"\n{error.hint}" if error.hint else ""
            note(f"loramux adapters {options.command}: {error.message} ({error.code}){hint}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loramux adapters", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *, server: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="JSON instead of lines")
        if server:
            add_options(added)
        return added

    command("ls", "list the server's adapters with their states")
    show = command("show", "say what an adapter is: a path here, or a name on the server (with --url always a name)")
    show.add_argument("path", metavar="PATH|NAME", help="the adapter's folder, a native file, or an adapter's name")
    add = command("add", "load an adapter into the server, or replace it by another version without a gap")
    add.add_argument("name", type=_name, metavar="NAME", help="what requests call it")
    add.add_argument("path", metavar="PATH", help="its folder or file, under an --adapter-root of the server")
    add.add_argument("--pin", action="store_true", help="and keep it in memory whatever else is needed there")
    add.add_argument(
        "--wait", type=_seconds, default=_WAIT_S, metavar="S", help=f"for it to be ready (default: {_WAIT_S:g})"
    )
    changes = {name: command(name, text) for name, text in _NAMED.items()}
    for change in changes.values():
        change.add_argument("name", type=_name, metavar="NAME", help="the adapter's name")
    fit = command("calibrate", "fit the confidence of an adapter's version to labelled answers")
    fit.add_argument("name", type=_name, metavar="NAME", help="the adapter's name")
    calibrate.add_arguments(fit)
    for changed in (add, changes["rm"], changes["rollback"]):
        changed.add_argument(
            "--if-match", type=_digest, metavar="VERSION", help="only if this is the version that serves now"
        )
    check = command("check", "say whether an adapter fits a base model and can be served", server=False)
    check.add_argument("path", metavar="PATH", help="the adapter's folder, or a native file")
    for local in (check, show):
        local.add_argument(
            "--base", metavar="BASE", help=f"to check it on: a folder or a name (default: {DEFAULT_BASE})"
        )
    for name, text in _MAKING.items():
        commands.add_parser(name, help=f"{text}: loramux adapters {name} --help")
    command("methods", "list the kinds of adapters and what each can do", server=False)
    return parser


def _is_local(options: argparse.Namespace) -> bool:
    """Does `show` mean a path? One that exists, or that cannot be a name; `--url` and `--base` settle it."""
    if options.base is not None:
        return True
    text: str = options.path
    if options.url is not None:
        return False
    looks = text.startswith(("/", ".", "~")) or text.endswith(".safetensors")
    return looks or Path(text).exists() or not _is_name(text)


def _is_name(text: str) -> bool:
    return ADAPTER_NAME.fullmatch(text.partition("@")[0]) is not None


def _name(text: str) -> str:
    if not _is_name(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be an adapter's name")
    return text


def _digest(text: str) -> str:
    """As `ls` and `show` print it; `name@digest`, an ETag's quotes and the whole digest will do."""
    digest = text.rpartition("@")[2].strip('"')
    if not re.fullmatch(r"[0-9a-f]{16,64}", digest):
        raise argparse.ArgumentTypeError(f"{text!r} is not a version; `loramux adapters ls` lists them")
    return digest[:16]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 3600")
    return seconds
