"""What `/metrics` shows as adapters come and go."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from loramux.metrics import AdapterMetrics

from ..fakes import World, until


@pytest.fixture
def prometheus() -> CollectorRegistry:
    return CollectorRegistry()


def resident_bytes(prometheus: CollectorRegistry, name: str) -> float | None:
    return prometheus.get_sample_value("loramux_adapter_resident_bytes", {"adapter": name})


async def test_resident_bytes_follow_the_adapter(prometheus: CollectorRegistry) -> None:
    world = World(observer=AdapterMetrics(prometheus))
    await world.registry.load("a", Path("/adapters/a"))
    assert resident_bytes(prometheus, "a") == 1000
    old = await world.registry.load("a", Path("/adapters/b"), replace=True)
    assert resident_bytes(prometheus, "a") == 1000
    old.acquire()
    await world.registry.unload("a")
    assert resident_bytes(prometheus, "a") == 1000  # running requests still hold it
    old.release()
    await until(lambda: resident_bytes(prometheus, "a") is None)


async def test_a_failed_reload_does_not_keep_the_bytes_of_the_old_version(prometheus: CollectorRegistry) -> None:
    world = World(observer=AdapterMetrics(prometheus))
    old = await world.registry.load("a", Path("/adapters/a"))
    old.acquire()
    await world.registry.unload("a")
    world.data_plane.error = OSError(5, "I/O error")
    with pytest.raises(Exception, match="I/O error"):
        await world.registry.load("a", Path("/adapters/b"))
    old.release()
    await until(lambda: resident_bytes(prometheus, "a") is None)


def test_names_beyond_the_budget_share_a_label(prometheus: CollectorRegistry) -> None:
    metrics = AdapterMetrics(prometheus, max_names=2)
    for i in range(50):
        metrics.loaded(f"a{i}", {"copy": 0.1}, 100)
        metrics.request_started(f"a{i}")
        metrics.request_ended(f"a{i}", "stop", 1, 2)
    count = "loramux_requests_total"
    assert prometheus.get_sample_value(count, {"adapter": "a0", "outcome": "stop"}) == 1
    assert prometheus.get_sample_value(count, {"adapter": "other", "outcome": "stop"}) == 48
    assert prometheus.get_sample_value("loramux_requests_in_flight", {"adapter": "other"}) == 0
    assert resident_bytes(prometheus, "a1") == 100
    assert resident_bytes(prometheus, "other") is None  # bytes of many under one gauge would mean nothing
    metrics.unloaded("a49")
    metrics.unloaded("a1")
    assert resident_bytes(prometheus, "a1") is None
    assert b"a49" not in generate_latest(prometheus)


def test_failures_count_by_code(prometheus: CollectorRegistry) -> None:
    metrics = AdapterMetrics(prometheus)
    metrics.load_failed("a", "adapter_corrupt")
    name = "loramux_adapter_load_failures_total"
    assert prometheus.get_sample_value(name, {"adapter": "a", "code": "adapter_corrupt"}) == 1
