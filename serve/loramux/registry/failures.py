"""What clients are told when a load fails."""

from __future__ import annotations

from pathlib import Path

from loramux.errors import AdapterRefused, AdapterSourceMissing, LoramuxError
from loramux_adapters import AdapterError, AdapterNotFound


def as_loramux_error(error: Exception, source: Path | None) -> LoramuxError:
    """`error` without a path of the host, to be kept: without its frames, and with them the reader's tensors."""
    return _translated(error, source).with_traceback(None)


def _translated(error: Exception, source: Path | None) -> LoramuxError:
    if isinstance(error, LoramuxError):
        return error
    if isinstance(error, AdapterError):
        message = error.message
        for path in (source, source.resolve()) if source is not None else ():
            # Messages cut long names short: so much of one is always there.
            message = message.replace(f"{path.parent}/"[:150], "")
        refused = AdapterSourceMissing if isinstance(error, AdapterNotFound) else AdapterRefused
        return refused(message, code=error.code, hint=error.hint, param=error.field)
    if isinstance(error, OSError):
        return AdapterRefused(
            f"The adapter could not be read: {error.strerror}.",
            code="adapter_unreadable",
            hint="Check the folder's permissions.",
        )
    return LoramuxError("The adapter could not be loaded.", hint="The server's log has the details.")
