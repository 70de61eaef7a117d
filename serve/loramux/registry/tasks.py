"""Work that goes on whoever waits for it, and whose turn it is."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import Counter
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from loramux.errors import LoramuxError

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Tasks:
    """Tasks that nobody's leaving cancels. The event loop itself keeps only weak references."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LoramuxError):  # of those the adapter's card tells
            logger.error("a bug in the adapter registry", exc_info=error)


async def all_of(work: Iterable[Coroutine[Any, Any, T]], context: contextvars.Context | None = None) -> list[T]:
    """What all of it returns, done at once, in order. Raises the first error, once nothing of it runs any more."""
    within = contextvars.copy_context() if context is None else context  # an empty one is false
    tasks = [within.run(asyncio.ensure_future, one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Turns:
    """One change of a name at a time; locks that nobody uses or waits for are dropped."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()

    async def take(self, name: str) -> None:
        self._users[name] += 1
        try:
            await self._locks.setdefault(name, asyncio.Lock()).acquire()
        except BaseException:
            self._forget(name)
            raise

    def give(self, name: str) -> None:
        self._locks[name].release()
        self._forget(name)

    def __len__(self) -> int:
        return len(self._locks)

    def _forget(self, name: str) -> None:
        self._users[name] -= 1
        if not self._users[name]:
            del self._users[name], self._locks[name]
