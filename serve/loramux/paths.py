"""Where loramux keeps what it downloads and builds."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$LORAMUX_CACHE`, else `$XDG_CACHE_HOME/loramux`, else `~/.cache/loramux`. The folder may not exist yet."""
    if own := os.environ.get("LORAMUX_CACHE"):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "loramux"
    return Path.home() / ".cache" / "loramux"
