"""What is written to a terminal, and to what is none."""

from __future__ import annotations

import io
import sys

import pytest

from loramux.console import StatusLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    line = StatusLine()
    line.clear()
    for seconds in (0, 1):
        line.show("reading", f" ({seconds} s)")
    line.clear()
    assert screen.getvalue() == "\r\x1b[Kreading (0 s)\r\x1b[Kreading (1 s)\r\x1b[K"


def test_progress_in_a_log_is_a_line_for_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    line = StatusLine()
    for text, seconds in (("reading", 0), ("reading", 1), ("copying", 2)):
        line.show(text, f" ({seconds} s)")
    line.clear()
    assert log.getvalue() == "reading\ncopying\n"
