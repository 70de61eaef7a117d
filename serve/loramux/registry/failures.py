"""What clients are told when a load fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux.errors import AdapterRefused, AdapterSourceMissing, LoramuxError
from loramux_adapters import AdapterCorrupt, AdapterError, AdapterNotFound


def as_loramux_error(error: Exception, source: Path | None) -> LoramuxError:
    """`error` without a path of the host, to be kept: without its frames, and with them the reader's tensors."""
    return _translated(error, source).with_traceback(None)


@contextmanager
def made_of(what: str, *, hint: str, lost: str, refused: str) -> Iterator[None]:
    """While a version is made of prepared ones: what is wrong with those, told of fields of the request that needs it.

    `lost`, with the hint: the field to blame if one is not there any more; `refused`: for all else.
    """
    try:
        yield
    except (AdapterCorrupt, AdapterNotFound):
        message = f"The prepared form of {what} is lost or damaged."
        raise AdapterRefused(message, code="adapter_unreadable", hint=hint, param=lost) from None
    except AdapterError as error:
        raise AdapterRefused(error.message, code=error.code, hint=error.hint, param=refused) from None


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
