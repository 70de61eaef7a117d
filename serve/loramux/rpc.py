"""What is used of vLLM's engine client, by whoever asks its worker for something."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol


class Workers(Protocol):
    """An engine client that hands calls over to its workers."""

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a worker method between two engine steps."""


class Engine(Workers, Protocol):
    """One that answers requests, too."""

    generate: Callable[..., AsyncGenerator[Any, None]]


async def call(workers: Workers, method: str, *args: Any) -> Any:
    """What a method of the worker returns."""
    # Tensor parallel size 1: one worker answers.
    return (await workers.collective_rpc(method, args=args))[0]
