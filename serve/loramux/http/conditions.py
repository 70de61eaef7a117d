"""`If-Match` and `If-None-Match` (RFC 9110): a change is made only to the version the caller has seen."""

from __future__ import annotations

from fastapi import Request

from loramux.errors import PreconditionFailed
from loramux.registry import Adapter, Condition


def condition(request: Request) -> Condition:
    """What the request's headers demand of the adapter, checked when it is the request's turn."""
    wanted = _tags(request, "if-match")
    unwanted = _tags(request, "if-none-match")

    def check(adapter: Adapter | None) -> None:
        version = adapter.current.digest if adapter else None
        for header, tags, demanded in (("If-Match", wanted, True), ("If-None-Match", unwanted, False)):
            if tags is None:
                continue
            matches = adapter is not None if "*" in tags else version is not None and version in tags
            if matches is not demanded:
                there = f"The adapter is at version {version or '(not read yet)'}" if adapter else "No such adapter"
                raise PreconditionFailed(
                    f"{there}: {header} is not met, nothing was changed.",
                    hint="GET /v1/adapters/NAME has the version, also as its ETag.",
                    param=header,
                )

    return check


def etag(adapter: Adapter) -> dict[str, str]:
    """The header that names the version the adapter is at."""
    return {"ETag": f'"{adapter.current.digest}"'} if adapter.current.digest else {}


def _tags(request: Request, header: str) -> set[str] | None:
    values = request.headers.getlist(header)
    if not values:
        return None
    tags = (tag.strip() for value in values for tag in value.split(","))
    # A weak tag never matches: ours are strong.
    return {tag if tag == "*" else tag.strip('"') for tag in tags if tag and not tag.startswith("W/")}
