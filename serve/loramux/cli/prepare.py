"""`loramux prepare [BASE]`: fetch and convert a base model ahead of time, and tell where it is."""

import argparse
import sys
import time
from collections.abc import Sequence

from loramux.bases import ARCHIVES, DEFAULT_BASE, BaseModelError, prepare_base
from loramux.console import note


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder (or hub id) to standard output, progress to standard error; 1 if there is none."""
    parser = argparse.ArgumentParser(prog="loramux prepare", description=__doc__)
    parser.add_argument(
        "base",
        nargs="?",
        default=DEFAULT_BASE,
        metavar="BASE",
        help=f"a folder, or one of: {', '.join(ARCHIVES)} (default: {DEFAULT_BASE})",
    )
    name = parser.parse_args(argv).base
    begin = time.monotonic()

    def report(line: str) -> None:
        note(f"[{time.monotonic() - begin:5.1f} s] {line}")

    try:
        place = prepare_base(name, progress=report)
    except BaseModelError as error:
        note(f"loramux prepare: {error}")
        return 1
    sys.stdout.write(f"{place}\n")
    return 0
