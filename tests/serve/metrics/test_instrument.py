"""Every request is counted once and holds its adapter exactly as long as the engine works for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from loramux.errors import AdapterNotFound
from loramux.metrics import AdapterMetrics, instrument
from loramux.registry import State, Version

from ..fakes import BASE, FakeEngine, World, lora_request, output, until

DELTA = SimpleNamespace(output_kind=SimpleNamespace(name="DELTA"))
CUMULATIVE = SimpleNamespace(output_kind=SimpleNamespace(name="CUMULATIVE"))


class Bench:
    """An engine, a registry with the adapter `a`, and the metrics."""

    def __init__(self) -> None:
        self.prometheus = CollectorRegistry()
        self.metrics = AdapterMetrics(self.prometheus)
        self.world = World(observer=self.metrics)
        self.version: Version

    def engine(self, *script: Any) -> FakeEngine:
        engine = FakeEngine(*script)
        instrument(engine, self.world.registry, self.metrics)
        return engine

    def stream(self, engine: FakeEngine, params: Any = DELTA, **kwargs: Any) -> Any:
        kwargs.setdefault("lora_request", lora_request(self.version, "a"))
        return engine.generate("prompt", params, "id", **kwargs)

    def value(self, name: str, **labels: str) -> float:
        return self.prometheus.get_sample_value(f"loramux_{name}", {"adapter": "a", **labels}) or 0.0

    @property
    def outcomes(self) -> dict[str, float]:
        return {
            sample.labels["outcome"]: sample.value
            for family in self.prometheus.collect()
            for sample in family.samples
            if sample.name == "loramux_requests_total" and sample.value
        }


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    bench.version = await bench.world.load("a")
    yield bench
    assert bench.version.leases == 0, "a lease was leaked"
    assert bench.value("requests_in_flight") == 0


async def collect(stream: Any) -> list[Any]:
    return [item async for item in stream]


@pytest.mark.parametrize("reason", ["stop", "length"])
async def test_a_finished_request_counts_under_its_reason(bench: Bench, reason: str) -> None:
    outputs = [output(([1], None)), output(([2, 3], reason), finished=True)]
    assert await collect(bench.stream(bench.engine(*outputs))) == outputs
    assert bench.outcomes == {reason: 1}
    assert bench.value("prompt_tokens_total") == 3
    assert bench.value("generation_tokens_total") == 3


@pytest.mark.parametrize(
    ("params", "outputs"),
    [
        (DELTA, [output(([1], None), ([1], None)), output(([2], "stop"), ([2, 3], "stop"), finished=True)]),
        (
            CUMULATIVE,
            [output(([1], None), ([1], None)), output(([1, 2], "stop"), ([1, 2, 3], "stop"), finished=True)],
        ),
        (CUMULATIVE, [output(([1, 2], "stop"), ([1, 2, 3], "stop"), finished=True)]),
    ],
    ids=["delta", "cumulative", "final only"],
)
async def test_tokens_of_all_choices_count_once(bench: Bench, params: Any, outputs: list[Any]) -> None:
    await collect(bench.stream(bench.engine(*outputs), params))
    assert bench.value("generation_tokens_total") == 5
    assert bench.outcomes == {"stop": 1}


async def test_latencies_are_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.5, 100.7, 101.3])  # entered, first token, one token, three tokens
    module = import_module("loramux.metrics.instrument")  # the package has a function of that name
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    outputs = [
        output(([], None)),
        output(([1], None)),
        output(([2], None)),
        output(([3, 4, 5], "stop"), finished=True),
    ]
    await collect(bench.stream(bench.engine(*outputs)))
    assert bench.value("time_to_first_token_seconds_count") == 1
    assert bench.value("time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert bench.value("inter_token_latency_seconds_count") == 2
    assert bench.value("inter_token_latency_seconds_sum") == pytest.approx(0.2 + 0.6 / 3)


async def test_without_streaming_the_engines_clock_is_used(bench: Bench) -> None:
    final = output(([1, 2, 3], "stop"), finished=True)
    final.metrics = SimpleNamespace(first_token_latency=0.25, first_token_ts=10.0, last_token_ts=12.0)
    await collect(bench.stream(bench.engine(final), CUMULATIVE))
    assert bench.value("time_to_first_token_seconds_sum") == pytest.approx(0.25)
    assert bench.value("inter_token_latency_seconds_sum") == pytest.approx(1.0)


async def test_the_lease_lasts_until_the_engine_is_done(bench: Bench) -> None:
    gate = asyncio.Event()
    engine = bench.engine(output(([1], None)), gate, output(([2], "stop"), finished=True))
    held: list[int] = []
    engine.on_close = lambda: held.append(bench.version.leases)
    task = asyncio.create_task(collect(bench.stream(engine)))
    await until(lambda: bench.value("requests_in_flight") == 1)
    assert bench.version.leases == 1
    gate.set()
    await task
    assert held == [1]


async def test_a_consumer_that_closes_early_is_an_abort(bench: Bench) -> None:
    engine = bench.engine(output(([1], None)), output(([2], "stop"), finished=True))
    held: list[int] = []
    engine.on_close = lambda: held.append(bench.version.leases)
    async with aclosing(bench.stream(engine)) as stream:
        async for _ in stream:
            break
    # All of it has happened when the consumer goes on, not at some later turn of the garbage collector.
    assert engine.log == ["entered", "left"]
    assert held == [1], "the adapter could be freed before the engine stopped"
    assert bench.outcomes == {"abort": 1}
    assert bench.value("generation_tokens_total") == 1


async def test_a_cancelled_request_is_an_abort(bench: Bench) -> None:
    engine = bench.engine(output(([1], None)), asyncio.Event())
    held: list[int] = []
    engine.on_close = lambda: held.append(bench.version.leases)
    task = asyncio.create_task(collect(bench.stream(engine)))
    await until(lambda: bench.value("requests_in_flight") == 1)
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held == [1]
    assert bench.outcomes == {"abort": 1}


async def test_one_of_two_choices_does_not_finish_a_request(bench: Bench) -> None:
    engine = bench.engine(output(([1], "stop"), ([1], None)), asyncio.Event())
    async with aclosing(bench.stream(engine)) as stream:
        await anext(stream)
    assert bench.outcomes == {"abort": 1}


async def test_a_failing_engine_is_an_error(bench: Bench) -> None:
    with pytest.raises(RuntimeError, match="engine"):
        await collect(bench.stream(bench.engine(output(([1], None)), RuntimeError("engine"))))
    assert bench.outcomes == {"error": 1}


async def test_a_failing_close_does_not_keep_the_lease(bench: Bench) -> None:
    def broken() -> None:
        raise RuntimeError("abort failed")

    engine = bench.engine(output(([1], None)), output(([2], None)))
    engine.on_close = broken
    stream = bench.stream(engine)
    await anext(stream)
    with pytest.raises(RuntimeError, match="abort failed"):
        await stream.aclose()


async def test_a_stream_that_is_never_started_holds_nothing(bench: Bench) -> None:
    engine = bench.engine(output(([1], "stop"), finished=True))
    await bench.stream(engine).aclose()
    assert engine.log == []
    assert bench.outcomes == {}


async def test_base_requests_need_no_lease(bench: Bench) -> None:
    engine = bench.engine(output(([1], "stop"), finished=True))
    await collect(bench.stream(engine, lora_request=None))
    assert engine.requests == [None]
    assert bench.prometheus.get_sample_value("loramux_requests_total", {"adapter": BASE, "outcome": "stop"}) == 1


@pytest.mark.parametrize("running", [0, 1])
async def test_a_version_unloaded_since_its_look_up_never_enters_the_engine(bench: Bench, running: int) -> None:
    engine = bench.engine(output(([1], "stop"), finished=True))
    stream = bench.stream(engine)
    held = [await bench.world.hold("a") for _ in range(running)]
    await bench.world.registry.delete("a")
    assert bench.version.state is (State.DRAINING if running else State.GONE)
    with pytest.raises(AdapterNotFound):
        await anext(stream)
    assert engine.log == []
    for version in held:
        bench.world.registry.release(version)


async def test_a_version_replaced_since_its_look_up_gives_way_to_the_new_one(bench: Bench) -> None:
    engine = bench.engine(output(([1], "stop"), finished=True))
    held: list[int] = []
    stream = bench.stream(engine)
    new = await bench.world.load("a", "another", replace=True)
    engine.on_close = lambda: held.append(new.leases)
    await collect(stream)
    assert engine.requests == [lora_request(new, f"a@{new.digest}")]
    assert engine.requests[0].lora_int_id in bench.world.data_plane.resident
    assert held == [1]
    assert new.leases == 0


async def test_a_version_asked_for_by_its_digest_is_not_exchanged(bench: Bench) -> None:
    engine = bench.engine(output(([1], "stop"), finished=True))
    asked = lora_request(bench.version, f"base:a@{bench.version.digest}")
    await bench.world.load("a", "another", replace=True)
    await until(lambda: bench.version.state is State.HOST)
    await collect(bench.stream(engine, lora_request=asked))  # it is brought back for it
    assert engine.requests == [lora_request(bench.version, f"base:a@{bench.version.digest}")]
    await bench.world.load("a", "third", replace=True)
    with pytest.raises(AdapterNotFound):
        await collect(bench.stream(engine, lora_request=asked))


async def test_an_answer_of_several_calls_is_of_one_version(bench: Bench) -> None:
    """Beam search calls the engine for every token, with the request it was given at the beginning."""
    engine = bench.engine(output(([1], "stop"), finished=True))
    asked = lora_request(bench.version, "a")
    await collect(bench.stream(engine, lora_request=asked))
    await bench.world.load("a", "another", replace=True)
    await collect(bench.stream(engine, lora_request=asked))
    assert {request.lora_name for request in engine.requests} == {bench.version.tag}


async def test_a_version_that_was_evicted_since_its_look_up_is_brought_back(bench: Bench) -> None:
    bench.world.data_plane.capacity = bench.world.registry._residency._capacity_bytes = 1000
    engine = bench.engine(output(([1], "stop"), finished=True))
    stream = bench.stream(engine)
    await bench.world.load("b")
    assert bench.version.state is State.HOST
    await collect(stream)
    assert engine.requests[0].lora_int_id == bench.version.version_id
    assert bench.value("load_wait_seconds_count") == 1


async def test_a_request_keeps_the_version_it_began_with(bench: Bench) -> None:
    gate = asyncio.Event()
    engine = bench.engine(output(([1], None)), gate, output(([2], "stop"), finished=True))
    task = asyncio.create_task(collect(bench.stream(engine)))
    await until(lambda: bench.version.leases)
    await bench.world.load("a", "b", replace=True)
    await asyncio.sleep(0.01)
    assert bench.version.version_id in bench.world.data_plane.resident
    gate.set()
    await task
    await until(lambda: bench.version.state is State.HOST)


async def test_an_adapter_inside_a_processed_prompt_is_leased_too(bench: Bench) -> None:
    gate = asyncio.Event()
    engine = bench.engine(output(([1], None)), gate, output(([2], "stop"), finished=True))
    prompt = SimpleNamespace(lora_request=lora_request(bench.version))
    task = asyncio.create_task(collect(engine.generate(prompt, DELTA, "id")))
    await until(lambda: bench.version.leases == 1)
    gate.set()
    await task
