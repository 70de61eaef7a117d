"""The `loramux` command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from loramux import __version__
from loramux.console import say

_USAGE = """\
usage: loramux COMMAND [options]

  serve [BASE]     serve a base model and its adapters    (loramux serve --help)
  prepare [BASE]   fetch and convert a base model, and tell where it is
  adapters CMD     check, show, compose adapters; list the methods    (loramux adapters --help)
  --version        print the version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv else "--help"
    if command in ("--version", "-V"):
        say(f"loramux {__version__}")
        return 0
    if command in ("--help", "-h", "help"):
        say(_USAGE)
        return 0
    run = _commands().get(command)
    if run is None:
        say(f"loramux: there is no command {command!r}.", _USAGE)
        return 2
    return run(argv)


def _commands() -> dict[str, Callable[[list[str]], int]]:
    # Imported per command: `loramux --version` must not load torch.
    def serve(argv: list[str]) -> int:
        from loramux.cli.serve import main as run

        return run(argv)

    def prepare(argv: list[str]) -> int:
        from loramux.cli.prepare import main as run

        return run(argv)

    def adapters(argv: list[str]) -> int:
        from loramux.cli.adapters import main as run

        return run(argv)

    return {"serve": serve, "prepare": prepare, "adapters": adapters}
