"""Where the lines of the access and the audit log go: standard output, unless logging was configured otherwise."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from loramux.http import access_log


def log_to(stream: TextIO) -> None:
    """Write both logs to `stream`, a line of JSON each. A logger somebody gave a handler or level keeps it."""
    for logger in (access_log.access, access_log.audit):
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
        if not logger.handlers:
            handler = logging.StreamHandler(stream)
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)
            logger.propagate = False


def stdout() -> TextIO:
    """Standard output as an object of its own: vLLM up to 0.31 puts a prefix before every line of `sys.stdout`."""
    return open(sys.stdout.fileno(), "w", buffering=1, encoding="utf-8", closefd=False)
