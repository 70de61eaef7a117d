"""Lines for the person at the terminal; logs go elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def say(*lines: str) -> None:
    """Write lines to standard output, at once."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def note(*lines: str) -> None:
    """Write lines to standard error, at once: progress and refusals, which are no part of a command's result."""
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()


def box(title: str, lines: Iterable[str]) -> list[str]:
    """A framed block: `── title ───` above, a rule below."""
    body = [f"  {line}" for line in lines]
    width = min(100, max([len(title) + 8, *(len(line) for line in body)]))
    return [f"── {title} {'─' * (width - len(title) - 4)}", *body, "─" * width]


class StatusLine:
    """Progress on standard error: one line that is rewritten on a terminal, else a line for every change."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self._shown = ""

    def show(self, text: str, tail: str = "") -> None:
        """`tail`, such as the seconds, changes all the time: on its own it makes no new line in a log."""
        if self.live:
            sys.stderr.write(f"\r\x1b[K{text}{tail}")
        elif text != self._shown:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        self._shown = text

    def clear(self) -> None:
        if self.live and self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
