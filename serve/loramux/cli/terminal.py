"""What a command shows on a terminal: text that cannot steer it, and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from loramux.console import say

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """`text` less its control characters: what a server or a model says must not move the cursor or colour text."""
    return text.translate(_CONTROL)


def show(value: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """A command's result: as JSON for machines, or lines for people."""
    say(*([json.dumps(value, indent=2)] if as_json else lines))


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
