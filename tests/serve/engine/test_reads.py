"""Reads over an engine that computes what the worker would: pieces, caches that hide rows, time that runs out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loramux.engine.reads import AT_ONCE, ReadFailed, Reads
from loramux.engine.scoring import Rows, Scoring
from loramux.registry import Version
from loramux.uncertainty import READ_KEY
from loramux.uncertainty.exchange import exchange

from ..fakes import FakeObserver, make_artefact

V = 30
PROMPT, ANSWER = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5]
HEAD = torch.randn(V, 8, generator=torch.Generator().manual_seed(0))


def version(number: int) -> Version:
    return Version("+drawn", Path("/none"), number, FakeObserver(), artefact=make_artefact(f"{number}"))


class Engine:
    """Hidden states depend on version and tokens so far. `cached`: rows that the prefix cache hides, if it may."""

    def __init__(self, rows: int = 100) -> None:
        self.worker = Scoring(vocabulary=V, state_bytes=rows * V * 4, device=torch.device("cpu"))
        self.cached = 0
        self.lost = False  # requests end without having run
        self.gate = asyncio.Event()
        self.gate.set()
        self.stuck: set[int] = set()
        self.running = self.most = 0
        self.requests: list[tuple[int, int]] = []  # version id, tokens
        self.dropped: list[str] = []
        self.priorities: set[int] = set()

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, lora_request: Any = None, priority: int = 0
    ) -> AsyncGenerator[Any, None]:
        self.priorities.add(priority)
        assert exchange.get() is None  # nothing of the request that asks
        number, tokens = lora_request.lora_int_id if lora_request else 0, prompt["prompt_token_ids"]
        self.requests.append((number, len(tokens)))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
            await asyncio.sleep(0.001)
            while number in self.stuck:
                await asyncio.sleep(0.01)
            if not self.lost:
                self.worker.watch(request_id, params.extra_args[READ_KEY])
                skipped = 0 if params.skip_reading_prefix_cache else self.cached
                hidden = hidden_states(number, tokens)[skipped:]
                self.worker.observe(hidden, [Rows(request_id, 0, skipped, len(hidden))], lambda h: h @ HEAD.T)
            yield SimpleNamespace(finished=True)
        finally:
            self.running -= 1
            self.worker.forget([request_id])

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "loramux_drop_scores":
            self.dropped.append(args[0])
            self.worker.drop(*args)
            return [None]
        return [self.worker.take(*args)]


def hidden_states(number: int, tokens: list[int]) -> torch.Tensor:
    states = [torch.Generator().manual_seed(hash((number, tuple(tokens[: i + 1]))) % 2**31) for i in range(len(tokens))]
    return torch.stack([torch.randn(8, generator=state) for state in states])


def probabilities(numbers: list[int], prompt: list[int], answer: list[int]) -> np.ndarray:
    hidden = torch.stack([hidden_states(i, [*prompt, *answer[:-1]])[len(prompt) - 1 :] for i in numbers])
    return torch.softmax((hidden @ HEAD.T).double(), -1).numpy()


def assert_equal(report: Any, numbers: list[int]) -> None:
    p = probabilities(numbers, PROMPT, ANSWER)
    np.testing.assert_allclose(report.logp[..., 0], np.log(p[:, range(len(ANSWER)), ANSWER]), atol=1e-5)
    np.testing.assert_allclose(report.entropy, -(p * np.log(p)).sum(-1), atol=1e-5)
    mean = p.mean(0)
    np.testing.assert_allclose(report.total, -(mean * np.log(mean)).sum(-1), atol=1e-5)


DRAWS = [version(i) for i in (1, 2, 3)]


@pytest.mark.parametrize("rows", [100, 6, 4, 1])
@pytest.mark.parametrize("cached", [0, 7, 50])
async def test_answers_longer_than_what_is_held_and_rows_that_the_cache_hides(rows: int, cached: int) -> None:
    engine = Engine(rows)
    engine.cached = min(cached, len(PROMPT) + len(ANSWER) - 2)
    assert_equal(await Reads(engine, rows).read(DRAWS, PROMPT, ANSWER), [1, 2, 3])
    pieces = -(-len(ANSWER) // min(rows, len(ANSWER)))
    assert len(engine.dropped) == pieces and engine.worker.idle
    if not cached:
        assert len(engine.requests) == 3 * pieces


async def test_the_base_model_can_be_read() -> None:
    engine = Engine()
    report = await Reads(engine, 100).read([None], PROMPT, ANSWER)
    assert_equal(report, [0])


async def test_only_some_read_at_once() -> None:
    engine = Engine()
    reads = Reads(engine, 100)
    draws = [version(i) for i in range(1, 10)]
    await asyncio.gather(reads.read(draws, PROMPT, ANSWER), reads.read(draws, PROMPT, ANSWER))
    assert engine.most == AT_ONCE


async def test_reads_come_last_where_the_engine_can_tell() -> None:
    engine = Engine()
    await Reads(engine, 100).read(DRAWS, PROMPT, ANSWER)
    assert engine.priorities == {0}  # any other is refused by a first-come engine
    await Reads(engine, 100, by_priority=True).read(DRAWS, PROMPT, ANSWER)
    assert max(engine.priorities) > 10**6


async def test_jobs_wait_for_rows_in_turn() -> None:
    engine = Engine(6)
    reads = Reads(engine, 6)
    for report in await asyncio.gather(*(reads.read(DRAWS, PROMPT, ANSWER) for _ in range(5))):
        assert_equal(report, [1, 2, 3])
    # One that leaves while it waits takes nothing with it.
    engine.gate.clear()
    tasks = [asyncio.create_task(reads.read(DRAWS, PROMPT, ANSWER)) for _ in range(3)]
    await asyncio.sleep(0.01)
    for task in (tasks[1], tasks[0]):
        task.cancel()
    engine.gate.set()
    assert_equal(await tasks[2], [1, 2, 3])
    assert reads._rows._free == 6


async def test_several_short_answers() -> None:
    answers = [[7], [8, 1], [8, 2, 3]]
    engine = Engine(0)
    logp = await Reads(engine, 0).targets(DRAWS, PROMPT, answers, timeout_s=None)
    for k, answer in enumerate(answers):
        p = probabilities([1, 2, 3], PROMPT, answer)
        np.testing.assert_allclose(logp[:, k], np.log(p[:, range(len(answer)), answer]).sum(1), atol=1e-5)
    assert len(engine.requests) == 9 and len(engine.dropped) == 3


async def test_what_was_read_in_time() -> None:
    engine = Engine()
    engine.stuck = {2}
    report = await Reads(engine, 100).read(DRAWS, PROMPT, ANSWER, timeout_s=0.2)
    assert np.isnan(report.logp).any((1, 2)).tolist() == [False, True, False]
    assert not np.isnan(report.total).any()
    assert engine.running == 0 and engine.worker.idle and len(engine.dropped) == 1


async def test_nothing_in_time() -> None:
    engine = Engine(6)
    engine.gate.clear()
    reads = Reads(engine, 6)
    reports = await asyncio.gather(*(reads.read(DRAWS, PROMPT, ANSWER, timeout_s=0.05) for _ in range(2)))
    for report in reports:
        assert report.logp.shape == (3, 6, 1) and np.isnan(report.logp).all() and np.isnan(report.total).all()
    assert engine.running == 0 and reads._rows._free == 6


async def test_requests_that_the_engine_ends() -> None:
    engine = Engine()
    engine.lost = True
    with pytest.raises(ReadFailed):
        await Reads(engine, 100).read(DRAWS, PROMPT, ANSWER)
    assert len(engine.requests) == 6  # it was tried twice


async def test_a_worker_without_room_is_an_error() -> None:
    engine = Engine(3)
    with pytest.raises(ReadFailed, match="do not fit"):
        await Reads(engine, 100).read(DRAWS, PROMPT, ANSWER)


async def test_an_engine_that_dies_is_an_error_and_gives_rows_back() -> None:
    engine = Engine()
    reads = Reads(engine, 100)

    async def dead(*_: Any, **__: Any) -> AsyncGenerator[Any, None]:
        raise ConnectionError("the engine is gone")
        yield

    engine.generate = dead  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        await reads.read(DRAWS, PROMPT, ANSWER)
    assert reads._rows._free == 100


async def test_entropies_of_a_dead_engine_are_none() -> None:
    engine = Engine()
    engine.worker = None  # type: ignore[assignment]
    assert await Reads(engine, 100).entropies("tag") == []


async def test_stages_end_when_it_is_enough() -> None:
    engine, asked = Engine(), []
    draws = [version(i) for i in range(1, 21)]

    def enough(report: Any) -> bool:
        asked.append(len(report.logp))
        assert_equal(report, list(range(1, asked[-1] + 1)))
        return asked[-1] == 8

    report = await Reads(engine, 100).read(draws, PROMPT, ANSWER, enough=enough)
    assert_equal(report, list(range(1, 9)))
    assert asked == [4, 8] and len(engine.requests) == 8 and engine.worker.idle and len(engine.dropped) == 1
    assert_equal(await Reads(engine, 100).read(draws, PROMPT, ANSWER, enough=lambda _: False), list(range(1, 21)))
    report = await Reads(engine, 4).read(draws[:5], PROMPT, ANSWER, enough=lambda _: True)  # in pieces: by all
    assert_equal(report, [1, 2, 3, 4, 5])


async def test_a_stage_that_is_late_is_the_last() -> None:
    engine = Engine()
    engine.stuck = {6}
    draws = [version(i) for i in range(1, 21)]
    report = await Reads(engine, 100).read(draws, PROMPT, ANSWER, timeout_s=0.3, enough=lambda _: False)
    assert report.logp.shape[0] == 8 and np.isnan(report.logp[5]).all() and not np.isnan(report.logp[:4]).any()
    assert {number for number, _ in engine.requests} <= {*range(1, 9)}


async def test_labels_in_stages() -> None:
    engine, asked = Engine(), []
    draws = [version(i) for i in range(1, 21)]

    def enough(logp: Any) -> bool:
        asked.append(len(logp))
        return asked[-1] == 8

    answers = [[7], [8, 9]]
    some = await Reads(engine, 100).targets(draws, PROMPT, answers, timeout_s=None, enough=enough)
    every = await Reads(engine, 100).targets(draws, PROMPT, answers, timeout_s=None)
    assert asked == [4, 8] and some.shape == (8, 2) and every.shape == (20, 2)
    np.testing.assert_allclose(some, every[:8], atol=1e-9)
