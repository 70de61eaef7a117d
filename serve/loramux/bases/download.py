"""`pip download`, with a bar for whoever watches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from loramux.console import StatusLine

_LOOK_S = 0.2


def pip_download(requirement: str, folder: Path, expected: int) -> subprocess.CompletedProcess[str]:
    """Download one wheel into `folder`, without what it needs. `expected`: its bytes, for the bar only.

    pip shows no bar of its own when it is not on a terminal, and talks about files while it is. It writes to its
    temporary folder first, so how far it is can be seen there.
    """
    scratch = folder / "partial"
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed one
    scratch.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    line = StatusLine()
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as pip:
            while True:
                try:
                    out, err = pip.communicate(timeout=_LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    if line.live:
                        line.show(bar(_largest(scratch), expected))
    finally:
        line.clear()
        shutil.rmtree(scratch, ignore_errors=True)
    return subprocess.CompletedProcess(command, pip.returncode, out, err)


def bar(done: int, total: int, width: int = 30) -> str:
    """`[######------] 40 of 93 MB`."""
    full = min(width, width * done // total)
    return f"[{'#' * full}{'-' * (width - full)}] {done / 1e6:.0f} of {total / 1e6:.0f} MB"


def _largest(folder: Path) -> int:
    """pip may write a file twice, for itself and for its cache."""
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except OSError:  # gone since it was listed
            continue
    return max(sizes)
