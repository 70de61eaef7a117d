"""Where adapters are read from: which paths are allowed, and which were read before."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from loramux.errors import PathNotAllowed

# A file may change twice within one tick of the file system's clock: what has just changed is not trusted.
_SETTLED_NS = 2 * 10**9


class Roots:
    """The folders requests may load from."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self._roots = tuple(root.resolve() for root in roots)

    def check(self, source: Path, param: str) -> Path:
        """`source` as an absolute path, if a root allows it. Raises PathNotAllowed."""
        try:
            resolved = source.expanduser().resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, an unknown ~user, a NUL
            resolved = None
        if resolved is None or not any(resolved.is_relative_to(root) for root in self._roots):
            raise PathNotAllowed(
                "This path is not under any adapter root.",
                hint="Start the server with --adapter-root DIR (repeatable) for folders requests may load from.",
                param=param,
            )
        return resolved


def signature(source: Path) -> str | None:
    """Name, size and time of last change of a source's files: equal only if its content is, as far as one can see.

    None when nothing can be said: it is not there, or it changed within the last two seconds.
    """
    try:
        files = [source] if source.is_file() else sorted(path for path in source.iterdir() if path.is_file())
        stats = [(path.name, os.stat(path)) for path in files]
    except OSError:
        return None
    if not stats or max(stat.st_mtime_ns for _, stat in stats) > time.time_ns() - _SETTLED_NS:
        return None
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
