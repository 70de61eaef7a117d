"""The `loramux` command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from loramux import __version__
from loramux.console import say

_USAGE = """\
usage: loramux COMMAND [options]

  serve [BASE]     serve a base model and its adapters    (loramux serve --help)
  adapters CMD     those of a server: ls, show, add, rm, pin, unpin, rollback; those here: check, compose, compact,
                   extract, methods
  chat [MODEL]     talk to a server's models
  doctor           what is installed, what would go wrong, and what to do about it
  prepare [BASE]   fetch and convert a base model, and tell where it is
  --version        print the version"""

# By name, each imported when it is called: `loramux --version` must not load torch.
_COMMANDS = {name: f"loramux.cli.{name}" for name in ("serve", "adapters", "chat", "doctor", "prepare")}


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
    if command not in _COMMANDS:
        say(f"loramux: there is no command {command!r}.", _USAGE)
        return 2
    try:
        status: int = importlib.import_module(_COMMANDS[command]).main(argv)
    except KeyboardInterrupt:
        return 130  # as a shell reports SIGINT
    except BrokenPipeError:
        # `loramux … | head`: Python would complain again when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
