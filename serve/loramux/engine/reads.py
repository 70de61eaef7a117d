"""The API process's side of teacher-forced reads: one short request per draw, and one call for what was read."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from loramux.engine.names import lora_request
from loramux.errors import LoramuxError
from loramux.registry import Version
from loramux.registry.tasks import all_of
from loramux.rpc import Engine, call
from loramux.uncertainty import READ_KEY
from loramux.uncertainty.adaptive import stages
from loramux.uncertainty.scores import Array

logger = logging.getLogger(__name__)

#: Where the engine schedules by priority: after all that somebody waits for, and the first to be preempted.
_LAST = 2**31 - 1

#: Reads in the engine at once, of all requests: each may take a step's whole budget of tokens, and others wait for it.
AT_ONCE = 4

Tokens = Sequence[int]


class ReadFailed(LoramuxError):
    """The engine did not read what it was asked to."""


@dataclass(frozen=True, eq=False)
class Report:
    """What S draws say about n tokens; NaN where a draw did not get there in time."""

    logp: Array  # [S, n, k] of the targets
    entropy: Array  # [S, n]
    total: Array  # [n] entropy of the mean


class Reads:
    """Reads tokens under versions that are leased.

    rows  tokens whose probabilities over the vocabulary the worker can sum at once; a longer answer is read piece by
          piece, the pieces before it then coming from the prefix cache
    by_priority  the engine has `--scheduling-policy priority`
    """

    def __init__(self, engine: Engine, rows: int, *, at_once: int = AT_ONCE, by_priority: bool = False) -> None:
        self._engine = engine
        self._options = {"priority": _LAST} if by_priority else {}
        self._rows = _Budget(rows)
        self._turns = asyncio.Semaphore(at_once)

    async def read(
        self,
        draws: Sequence[Version | None],
        prompt: Tokens,
        answer: Tokens,
        *,
        timeout_s: float | None = None,
        enough: Callable[[Report], bool] | None = None,
    ) -> Report:
        """log-probability of every token of the answer and entropies over the vocabulary, under every draw (None: the
        base model). After `timeout_s`, what there is by then. Raises ReadFailed.

        With `enough` the draws read in stages (`adaptive.stages`), until it says so: the report is of those that read.
        An answer that takes several pieces is read by all.
        """
        if len(answer) > self._rows.size:
            enough = None
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        parts = []
        for begin in range(0, len(answer), self._rows.size):
            end = min(begin + self._rows.size, len(answer))
            targets = [[token] for token in answer[begin:end]]
            parts.append(await self._job(draws, [*prompt, *answer[: end - 1]], targets, True, deadline, enough))
        return Report(*(np.concatenate([getattr(part, name) for part in parts], axis) for name, axis in _AXES))

    async def targets(
        self,
        draws: Sequence[Version | None],
        prompt: Tokens,
        answers: Sequence[Tokens],
        *,
        timeout_s: float | None,
        enough: Callable[[Array], bool] | None = None,
    ) -> Array:
        """log p_s(answer | prompt) of each of several short answers: [S, K]; as `read`, without entropies."""
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        found: Array = np.empty((0, len(answers)))
        for count in stages(len(draws)) if enough is not None else [len(draws)]:
            part = await self._targets(draws[len(found) : count], prompt, answers, deadline)
            found = np.concatenate([found, part])
            if np.isnan(found).any() or (enough is not None and count < len(draws) and enough(found)):
                break
        return found

    async def _targets(
        self, draws: Sequence[Version | None], prompt: Tokens, answers: Sequence[Tokens], deadline: float | None
    ) -> Array:
        # What all begin with is one row of one request.
        first = self._job(draws, prompt, [[answer[0] for answer in answers]], False, deadline)
        rest = [
            self._job(draws, [*prompt, *answer[:-1]], [[token] for token in answer[1:]], False, deadline)
            for answer in answers
            if len(answer) > 1
        ]
        begun, *ended = await all_of([first, *rest])
        logp: Array = begun.logp[:, 0].copy()
        for place, report in zip((k for k, answer in enumerate(answers) if len(answer) > 1), ended, strict=True):
            logp[:, place] += report.logp[..., 0].sum(1)
        return logp

    async def entropies(self, tag: str) -> list[float]:
        """Of every token that was sampled for a request with this tag, NaN where it is not known; once."""
        try:
            found: list[float | None] = await call(self._engine, "loramux_entropies", tag)
        except Exception as error:  # an answer is worth more than its statistics
            logger.warning("no entropies: %s", error)
            return []
        return [math.nan if value is None else value for value in found]

    async def _job(
        self,
        draws: Sequence[Version | None],
        tokens: Tokens,
        targets: Sequence[Tokens],
        full: bool,
        deadline: float | None,
        enough: Callable[[Report], bool] | None = None,
    ) -> Report:
        job = uuid.uuid4().hex
        first = len(tokens) - len(targets)
        spec = {"job": job, "draws": len(draws), "first": first, "targets": targets, "full": full}
        n, s = len(targets), len(draws)
        empty = Report(np.full((s, n, len(targets[0])), np.nan), np.full((s, n), np.nan), np.full(n, np.nan))
        try:
            async with asyncio.timeout_at(deadline):
                await self._rows.take(n if full else 0)
        except TimeoutError:
            return empty
        try:
            done, found = 0, empty
            for count in stages(s) if enough is not None else [s]:
                report, whole = await self._stage(range(done, count), draws, tokens, spec, deadline)
                if report is not None:
                    found = Report(
                        np.array(report["logp"])[:count],
                        np.array(report["entropy"])[:count] if full else empty.entropy,
                        np.array(report["total"]) if full else empty.total,
                    )
                if not whole or (enough is not None and count < s and enough(found)):
                    break
                done = count
            return found
        finally:
            await asyncio.shield(self._end(job, n if full else 0))

    async def _stage(
        self,
        places: range,
        draws: Sequence[Version | None],
        tokens: Tokens,
        spec: dict[str, Any],
        deadline: float | None,
    ) -> tuple[dict[str, Any] | None, bool]:
        """Let the draws at these places read; what the job has read by then, and whether that is all it was to."""
        report, missing = None, list(places)
        # The second time for rows that came out of the prefix cache, where there are no hidden states.
        for cached in (True, False):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    # Nothing of the request that asks may cling to these: a context of their own.
                    requests = [self._request(draws[i], tokens, spec | {"draw": i}, cached) for i in missing]
                    await all_of(requests, contextvars.Context())
            report = await call(self._engine, "loramux_scores", spec["job"])
            if report is not None and report["error"] is not None:
                raise ReadFailed(f"The answer could not be read: {report['error']}.")
            if report is not None:
                missing = [i for i in places if not all(report["seen"][i])]
            if not missing or (deadline is not None and asyncio.get_running_loop().time() >= deadline):
                return report, not missing
        raise ReadFailed("The engine ended requests that were to be read.")

    async def _request(self, draw: Version | None, tokens: Tokens, spec: dict[str, Any], cached: bool) -> None:
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=not cached,
            extra_args={READ_KEY: spec},
        )
        async with self._turns:
            stream = self._engine.generate(
                {"prompt_token_ids": list(tokens)},
                params,
                f"loramux-read-{uuid.uuid4().hex}",
                lora_request=None if draw is None else lora_request(draw.tag, draw),
                **self._options,
            )
            async with aclosing(stream):
                async for _ in stream:
                    pass

    async def _end(self, job: str, rows: int) -> None:
        with contextlib.suppress(Exception):  # the engine may be gone; the first error tells more
            await call(self._engine, "loramux_drop_scores", job)
        self._rows.give(rows)


class _Budget:
    """So many rows, given in the order in which they are asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = size
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, rows: int) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((rows, waiter))
        self._serve()
        try:
            await waiter
        except asyncio.CancelledError:
            if (rows, waiter) in self._queue:
                self._queue.remove((rows, waiter))
                self._serve()
            elif not waiter.cancelled():  # it was its turn in the same moment
                self.give(rows)
            raise

    def give(self, rows: int) -> None:
        self._free += rows
        self._serve()

    def _serve(self) -> None:
        while self._queue and self._queue[0][0] <= self._free:
            rows, waiter = self._queue.popleft()
            if not waiter.cancelled():
                self._free -= rows
                waiter.set_result(None)


_AXES = (("logp", 1), ("entropy", 1), ("total", 0))
