"""`loramux doctor`: what is installed, what would go wrong, and what to do about it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from loramux.cli.client import Client, add_options
from loramux.console import note, say
from loramux.doctor import CHECKS, Finding, Level, Machine, examine
from loramux.errors import LoramuxError

_COLOURS = {Level.OK: "32", Level.WARN: "33", Level.FAIL: "31"}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="loramux doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a JSON list instead of lines")
    add_options(parser)
    options = parser.parse_args(argv)
    try:
        client = Client.of(options)
    except LoramuxError as error:
        note(f"loramux doctor: {error}")
        return 1
    return report(Machine(client.url, client.key), as_json=options.json)


def report(machine: Machine, *, as_json: bool) -> int:
    """Print what the checks find, each at once; the exit status."""
    found: list[Finding] = []
    for finding in examine(machine, CHECKS):
        found.append(finding)
        if not as_json:
            say(*_lines(finding))
    if as_json:
        say(json.dumps([asdict(finding) for finding in found], indent=2))
    failed = sum(finding.level is Level.FAIL for finding in found)
    if not as_json:
        say("", "Nothing keeps loramux from serving." if not failed else f"{failed} to put right before serving.")
    return 1 if failed else 0


def _lines(finding: Finding) -> list[str]:
    level = finding.level.ljust(4)
    if sys.stdout.isatty():
        level = f"\x1b[{_COLOURS[finding.level]}m{level}\x1b[0m"
    lines = [f"{level}  {finding.subject:<19} {finding.text}"]
    return [*lines, f"{' ' * 26}{finding.advice}"] if finding.advice else lines
