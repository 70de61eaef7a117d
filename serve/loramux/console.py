"""Lines for the person at the terminal; logs go elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def say(*lines: str) -> None:
    """Write lines to standard output, at once."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def box(title: str, lines: Iterable[str]) -> list[str]:
    """A framed block: `── title ───` above, a rule below."""
    body = [f"  {line}" for line in lines]
    width = min(100, max([len(title) + 8, *(len(line) for line in body)]))
    return [f"── {title} {'─' * (width - len(title) - 4)}", *body, "─" * width]
