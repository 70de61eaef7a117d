"""Reports by request and counters by adapter, from an engine that answers like ours."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from loramux.metrics.labels import Labels
from loramux.metrics.routing import REQUEST_KEY, Report, RoutingMetrics, RoutingWatch, wanted

SUMS = {"decisions": 4, "tokens": 2, "entropy": 2.0, "selected": [4, 2], "weight": [3.0, 1.0]}


class Engine:
    """Remembers the tags it was given, and hands out SUMS for each."""

    def __init__(self) -> None:
        self.tags: list[str | None] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.sums: dict[int, dict[str, Any]] = {}
        self.report: Any = dict(SUMS)
        self.fail = False

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncGenerator[Any, None]:
        self.tags.append((sampling_params.extra_args or {}).get(REQUEST_KEY))
        yield SimpleNamespace(finished=False)
        yield SimpleNamespace(finished=True)

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append((method, args))
        if self.fail:
            raise ConnectionError("the engine is gone")
        if method == "loramux_routing":
            sums, self.sums = self.sums, {}
            return [sums]
        return [self.report]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def watch(engine: Engine, registry: CollectorRegistry) -> RoutingWatch:
    return RoutingWatch(engine, RoutingMetrics(Labels(10), registry))


def _lora(name: str = "desk@3f", version_id: int = 7) -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=version_id)


async def _run(engine: Any, *, ask: bool, lora: Any, outputs: int = 9) -> Report:
    report, params = Report(), SimpleNamespace(extra_args={"mine": 1})
    token = wanted.set(report if ask else None)
    try:
        async with contextlib.aclosing(engine.generate("hi", params, "r", lora_request=lora)) as stream:
            async for _ in stream:
                outputs -= 1
                if not outputs:
                    break
    finally:
        wanted.reset(token)
    assert params.extra_args["mine"] == 1
    return report


async def test_a_request_that_asks_gets_means_over_its_decisions(engine: Engine, watch: RoutingWatch) -> None:
    report = await _run(engine, ask=True, lora=_lora())
    assert report.value == {
        "adapter": "desk@3f",
        "tokens": 2,
        "decisions": 4,
        "entropy_nats": 0.5,
        "experts": [
            {"expert": 0, "weight": 0.75, "selected": 1.0},
            {"expert": 1, "weight": 0.25, "selected": 0.5},
        ],
    }
    assert engine.calls == [("loramux_routing_report", (engine.tags[0],))]


async def test_a_request_that_was_processed_before_carries_its_adapter(engine: Engine, watch: RoutingWatch) -> None:
    params, report = SimpleNamespace(extra_args=None), Report()
    token = wanted.set(report)
    prompt = SimpleNamespace(lora_request=_lora(), sampling_params=params)
    async for _ in engine.generate(prompt, params, "r"):
        pass
    wanted.reset(token)
    assert report.value is not None and report.value["adapter"] == "desk@3f" and engine.tags[0]


async def test_every_request_has_a_tag_of_its_own(engine: Engine, watch: RoutingWatch) -> None:
    for _ in range(3):
        await _run(engine, ask=True, lora=_lora())
    assert len(set(engine.tags)) == 3 and None not in engine.tags


async def test_the_choices_of_one_request_are_reported_on_together(engine: Engine, watch: RoutingWatch) -> None:
    report, params = Report(), [SimpleNamespace(extra_args=None) for _ in range(3)]
    token = wanted.set(report)
    streams = [engine.generate("hi", one, "r", lora_request=_lora()) for one in params]
    for _ in range(2):  # all begin before one ends
        for stream in streams:
            assert report.value is None and not engine.calls
            await anext(stream)
    for stream in streams:
        await stream.aclose()
    wanted.reset(token)
    assert engine.tags == [report.tag] * 3
    assert engine.calls == [("loramux_routing_report", (report.tag,))]
    assert report.value is not None and report.value["decisions"] == 4


@pytest.mark.parametrize(("ask", "lora"), [(False, _lora()), (True, None)])
async def test_nobody_else_is_reported_on(engine: Engine, watch: RoutingWatch, ask: bool, lora: Any) -> None:
    assert (await _run(engine, ask=ask, lora=lora)).value is None
    assert engine.tags == [None] and not engine.calls


async def test_a_plain_adapter_has_no_report(engine: Engine, watch: RoutingWatch) -> None:
    engine.report = {"decisions": 0, "tokens": 0, "entropy": 0.0, "selected": [], "weight": []}
    assert (await _run(engine, ask=True, lora=_lora())).value is None


async def test_an_answer_is_worth_more_than_its_report(engine: Engine, watch: RoutingWatch) -> None:
    engine.fail = True
    assert (await _run(engine, ask=True, lora=_lora())).value is None


async def test_a_request_that_ends_early_leaves_nothing_in_the_worker(engine: Engine, watch: RoutingWatch) -> None:
    assert (await _run(engine, ask=True, lora=_lora(), outputs=1)).value is None
    assert engine.calls == [("loramux_routing_report", (engine.tags[0],))]


async def test_samples_become_counters(engine: Engine, watch: RoutingWatch, registry: CollectorRegistry) -> None:
    await _run(engine, ask=False, lora=_lora())
    for _ in range(2):
        engine.sums = {7: SUMS, 99: SUMS}  # nobody knows version 99
        await _run(engine, ask=False, lora=_lora())
        await watch.collect()
    value = registry.get_sample_value
    assert value("loramux_router_decisions_total", {"adapter": "desk"}) == 8
    assert value("loramux_router_entropy_nats_total", {"adapter": "desk"}) == 4
    assert value("loramux_expert_decisions_total", {"adapter": "desk", "expert": "1"}) == 4
    assert value("loramux_expert_weight_total", {"adapter": "desk", "expert": "0"}) == 6
    assert {s.labels.get("adapter") for f in registry.collect() for s in f.samples} == {"desk"}


async def test_an_idle_engine_is_left_alone(engine: Engine, watch: RoutingWatch) -> None:
    await watch.collect()
    assert not engine.calls
    await _run(engine, ask=False, lora=_lora())
    for _ in range(3):
        await watch.collect()
    assert [method for method, _ in engine.calls] == ["loramux_routing"]


async def test_names_are_bounded(
    engine: Engine, watch: RoutingWatch, registry: CollectorRegistry, monkeypatch: Any
) -> None:
    monkeypatch.setattr("loramux.metrics.routing._MAX_NAMES", 3)
    for version_id in range(10):
        await _run(engine, ask=False, lora=_lora(f"a{version_id}@0", version_id))
    engine.sums = dict.fromkeys(range(10), SUMS)
    await watch.collect()
    names = {s.labels["adapter"] for f in registry.collect() for s in f.samples}
    assert names == {"a7", "a8", "a9"}
