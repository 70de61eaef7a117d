"""How far a download is, as seen from its temporary folder; that pip works at all is in test_prepare."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from loramux.bases import download


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (0, "[----------] 0 of 100 MB"),
        (47_000_000, "[####------] 47 of 100 MB"),
        (100_000_000, "[##########] 100 of 100 MB"),
        (120_000_000, "[##########] 120 of 100 MB"),  # the size is only about right
    ],
)
def test_the_bar(done: int, expected: str) -> None:
    assert download.bar(done, 100_000_000, 10) == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


PIP = """\
import os, pathlib, sys, time
folder = pathlib.Path(os.environ["TMPDIR"])
(folder / "unpack").mkdir()
(folder / "unpack" / "a.whl").write_bytes(bytes(2_000_000))
(folder / "cache").write_bytes(bytes(1_000_000))
sys.stdin.read()
sys.exit("no such package")
"""


def test_a_terminal_sees_it_come_and_the_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that has written 2 of 4 MB, and fails once that was seen."""
    (tmp_path / "pip.py").write_text(PIP)
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "left by a killed one").touch()
    real = download.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        process = real([sys.executable, str(tmp_path / "pip.py")], stdin=download.subprocess.PIPE, **options)
        screen.seen = process.stdin
        return process

    class Screen(Terminal):
        seen: object = None

        def write(self, text: str) -> int:
            if "2 of 4 MB" in text:
                self.seen.close()  # type: ignore[attr-defined]
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setattr(download, "_LOOK_S", 0.02)
    monkeypatch.setattr(download.subprocess, "Popen", popen)
    done = download.pip_download("a==1", tmp_path, 4_000_000)
    assert (done.returncode, done.stderr.strip()) == (1, "no such package")
    assert screen.getvalue().endswith("\r\x1b[K") and not (tmp_path / "partial").exists()
