"""Loads into one pool: what the engine's thread does of them, a bounded piece of work between two steps.

The stager reads; here its pieces are copied, on a stream beside the steps'. A version is published, and so visible to
steps, when all its copies have run: no step waits for one.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from vllm.logger import init_logger

from loramux.engine.copies import Copies
from loramux.staging import Failed, Planned, Staged, Staging, StagingEnded
from loramux_kernels import AdapterPool, PoolFull

logger = init_logger("vllm.loramux")

_STAGERS_PER_LOAD = 2
"""A stager may be killed for what is not the artefact's fault; twice in a row it is."""


@dataclass(frozen=True)
class Arrived:
    """A version that steps may use. `nbytes`: its own; `mixture`: it has routers; `whole`: it has borrowed nothing."""

    artefact: str
    slot: int
    nbytes: int
    mixture: bool
    whole: bool


@dataclass
class _Load:
    artefact: str
    lender: Arrived | None = None  # what of it is the same need not be copied
    attempt: int | None = None  # its number for the stager, once asked for
    stagers: int = 0
    slot: int | None = None
    planned: Planned | None = None
    staged: bool = False  # the last piece has come
    arrived: Arrived | None = None
    error: dict[str, Any] | None = None

    @property
    def over(self) -> bool:
        return self.arrived is not None or self.error is not None


class Loads:
    """Versions on their way into the pool, one after the other. Whoever asks for one moves the first of them on.

    `uncountable`: why this engine cannot serve an adapter with a capacity, if it cannot (`sequences.py`).
    """

    def __init__(self, pool: AdapterPool, staging: Staging, uncountable: str | None = None) -> None:
        self._pool = pool
        self._uncountable = uncountable
        self._staging = staging
        self._copies = Copies(pool.device)
        self._loads: dict[int, _Load] = {}  # by version id, in the order in which they were begun
        self._attempts = itertools.count()

    def begin(self, version_id: int, artefact: str, lender: Arrived | None = None) -> None:
        """`lender`: a whole version in the pool, which the new one may borrow B from; until `lends_no_more`."""
        self.abandon(version_id)
        self._loads[version_id] = load = _Load(artefact, lender)
        if load is self._first():
            with suppress(StagingEnded):  # the next turn sees it as well
                self._ask(load)

    def advance(self, version_id: int) -> Arrived | dict[str, Any] | Literal["reading", "copying"]:
        """One piece of work, then how this version stands; a dict is the error that has ended its load.

        "reading": there was no work to do. A load is forgotten when its end is told.
        """
        if version_id not in self._loads:
            return _error("internal_error", "this load was not begun or has ended")
        worked = self._work()
        load = self._loads[version_id]
        if load.over:
            del self._loads[version_id]
        return load.arrived or load.error or ("copying" if worked else "reading")

    def abandon(self, version_id: int) -> None:
        """Forget a load, if there is one, with all that it has reserved."""
        if (load := self._loads.pop(version_id, None)) is not None:
            self._drop(load)

    def lends_no_more(self, slot: int) -> None:
        """A slot is about to be released: what has not borrowed from it yet is loaded whole."""
        for load in self._loads.values():
            if load.lender is None or load.lender.slot != slot:
                continue
            load.lender = None  # the slot's number will be another's
            if load.slot is None and load.attempt is not None:
                self._staging.cancel(load.attempt)
                load.attempt = None

    def close(self) -> None:
        self._staging.close()

    def _first(self) -> _Load | None:
        return next((load for load in self._loads.values() if not load.over), None)

    def _work(self) -> bool:
        """Whether there was anything to do."""
        for piece in self._copies.ended():
            self._staging.give_back(piece)
        if (load := self._first()) is None:
            return False
        try:
            return self._move(load)
        except StagingEnded:
            self._again(load)
        except PoolFull as full:
            self._fail(load, {"code": "adapter_memory_full", "needed": full.needed_bytes, "free": full.free_bytes})
        except Exception as error:  # nothing may stay reserved, whatever went wrong
            logger.exception("copying %s failed", load.artefact)
            self._fail(load, _error("internal_error", f"The adapter could not be copied: {error}"))
        return True

    def _move(self, load: _Load) -> bool:
        attempt = load.attempt if load.attempt is not None else self._ask(load)
        if load.staged:
            if self._copies.busy:
                return False
            load.arrived = self._publish(load)
            return True
        match self._staging.receive(attempt):
            case None:
                return False
            case Planned() as planned:
                load.planned = planned
                if self._uncountable and any(layout.limited for layout in planned.layouts.values()):
                    message = f"The adapter has a capacity, and this engine cannot count tokens: {self._uncountable}."
                    self._fail(load, _error("adapter_unservable", message))
                    return True
                load.slot = self._pool.reserve_laid_out(planned.layouts, load.lender.slot if load.lender else None)
                self._copies.wait_for_steps()
            case Staged() as staged:
                assert load.slot is not None
                with self._copies.issue(staged.piece):
                    self._pool.write_image(load.slot, self._staging.data(staged))
                load.staged = staged.last
            case Failed() as failed:
                if failed.detail:
                    logger.error("loading %s failed\n%s", load.artefact, failed.detail)
                self._fail(load, _error(failed.code, failed.message))
        return True

    def _ask(self, load: _Load) -> int:
        load.attempt = next(self._attempts)
        self._staging.begin(load.attempt, load.artefact, load.lender.artefact if load.lender else None)
        return load.attempt

    def _publish(self, load: _Load) -> Arrived:
        assert load.slot is not None and load.planned is not None
        self._pool.publish(load.slot)
        layouts = load.planned.layouts.values()
        nbytes, whole = sum(layout.nbytes for layout in layouts), not any(layout.borrowed for layout in layouts)
        return Arrived(load.artefact, load.slot, nbytes, load.planned.mixture, whole)

    def _again(self, load: _Load) -> None:
        """The stager has died: another one, and the load from its start, unless that has been tried."""
        logger.warning("the process that reads adapters has ended while %s was loaded: starting another", load.artefact)
        load.stagers += 1
        self._drop(load)
        load.attempt, load.staged = None, False
        try:
            self._staging.restart()
        except OSError as error:
            self._fail(load, _error("internal_error", f"The adapter could not be read: {error.strerror}."))
        if load.stagers == _STAGERS_PER_LOAD:
            self._fail(load, _error("adapter_unreadable", "The prepared adapter could not be read."))

    def _fail(self, load: _Load, error: dict[str, Any]) -> None:
        load.error = load.error or error
        self._drop(load)

    def _drop(self, load: _Load) -> None:
        if load.attempt is not None:
            self._staging.cancel(load.attempt)
        if load.slot is not None:
            self._pool.release(load.slot)
            load.slot = None


def _error(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message}
