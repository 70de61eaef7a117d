"""What `/metrics` shows as adapters come and go."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry, generate_latest

import loramux
from loramux.metrics import AdapterMetrics
from loramux.registry import State

LIMIT_BYTES = 2_000_000


@pytest.fixture
def prometheus() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(prometheus: CollectorRegistry) -> AdapterMetrics:
    return AdapterMetrics(prometheus)


def resident_bytes(prometheus: CollectorRegistry, name: str) -> float | None:
    return prometheus.get_sample_value("loramux_adapter_resident_bytes", {"adapter": name})


def adapters(prometheus: CollectorRegistry) -> dict[str, int]:
    """The states that adapters are in, with their counts."""
    return {
        sample.labels["state"]: int(sample.value)
        for family in prometheus.collect()
        for sample in family.samples
        if sample.name == "loramux_adapters" and sample.value
    }


def bring_up(metrics: AdapterMetrics, name: str, path: Sequence[State] = (State.HOST, State.RESIDENT)) -> None:
    """Everything the registry reports of an adapter that is loaded from its source."""
    for old, new in itertools.pairwise([None, State.KNOWN, State.VERIFYING, *path]):
        assert new is not None
        metrics.moved(name, old, new)
    metrics.loaded(name, "source", {"read": 0.2, "verify": 0.1, "copy": 0.01}, 100)


def use(metrics: AdapterMetrics, name: str, outcome: str = "stop") -> None:
    """Everything one request reports."""
    metrics.waited(name, 0.3)
    metrics.leases(name, 1)
    metrics.request_started(name)
    metrics.queued(name, 0.001)
    metrics.first_token(name, 0.1)
    metrics.tokens(name, 0.02, 2)
    metrics.request_ended(name, outcome, 10, 3)
    metrics.leases(name, 0)


def take_down(metrics: AdapterMetrics, name: str) -> None:
    metrics.moved(name, State.RESIDENT, State.DRAINING)
    metrics.unloaded(name)
    metrics.moved(name, State.DRAINING, State.GONE)


def test_resident_bytes_follow_the_adapter(prometheus: CollectorRegistry, metrics: AdapterMetrics) -> None:
    bring_up(metrics, "a")
    assert resident_bytes(prometheus, "a") == 100
    metrics.loaded("a", "source", {"copy": 0.01}, 250)  # the next version; the old one drains
    metrics.moved("a", State.RESIDENT, State.DRAINING)
    assert resident_bytes(prometheus, "a") == 250
    metrics.unloaded("a")
    assert resident_bytes(prometheus, "a") is None


def test_an_adapter_has_one_state(prometheus: CollectorRegistry, metrics: AdapterMetrics) -> None:
    bring_up(metrics, "a")
    assert adapters(prometheus) == {"resident": 1}
    bring_up(metrics, "a", path=[State.HOST])  # a second version, not on the device yet
    assert adapters(prometheus) == {"resident": 1}
    assert prometheus.get_sample_value("loramux_adapter_state", {"adapter": "a", "state": "resident"}) == 1
    metrics.moved("a", State.HOST, State.RESIDENT)
    take_down(metrics, "a")
    assert adapters(prometheus) == {"resident": 1}
    metrics.moved("a", State.RESIDENT, State.DRAINING)
    assert adapters(prometheus) == {"draining": 1}
    metrics.moved("a", State.DRAINING, State.GONE)
    assert adapters(prometheus) == {}
    assert prometheus.get_sample_value("loramux_adapters", {"state": "resident"}) == 0  # a series, not a gap


def test_the_version_that_stays_gives_the_state(prometheus: CollectorRegistry, metrics: AdapterMetrics) -> None:
    bring_up(metrics, "a", path=[State.HOST])
    bring_up(metrics, "a", path=[State.FAILED])
    assert adapters(prometheus) == {"failed": 1}
    metrics.moved("a", State.FAILED, State.GONE)
    assert adapters(prometheus) == {"host": 1}


def test_loads_count_by_stage_and_tier(prometheus: CollectorRegistry, metrics: AdapterMetrics) -> None:
    metrics.loaded("a", "source", {"read": 0.2, "verify": 0.1, "copy": 0.01}, 100)
    metrics.loaded("a", "host", {"copy": 0.02}, 100)
    metrics.loaded("b", "host", {"copy": 0.04}, 100)
    for tier, stage, count, seconds in (
        ("source", "read", 1, 0.2),
        ("source", "copy", 1, 0.01),
        ("host", "copy", 1, 0.02),
    ):
        of_a = {"adapter": "a", "tier": tier, "stage": stage}
        assert prometheus.get_sample_value("loramux_adapter_load_seconds_count", of_a) == count
        assert prometheus.get_sample_value("loramux_adapter_load_seconds_sum", of_a) == pytest.approx(seconds)
    of_all = {"tier": "host", "stage": "copy"}
    assert prometheus.get_sample_value("loramux_load_seconds_count", of_all) == 2
    assert prometheus.get_sample_value("loramux_load_seconds_bucket", {**of_all, "le": "0.05"}) == 2


def test_events_of_the_registry_count(prometheus: CollectorRegistry, metrics: AdapterMetrics) -> None:
    metrics.load_failed("a", "adapter_corrupt")
    metrics.evicted("a")
    metrics.waited("a", 0.3)
    metrics.queued("a", 0.002)
    for series, labels, expected in (
        ("loramux_adapter_load_failures_total", {"code": "adapter_corrupt"}, 1),
        ("loramux_adapter_evictions_total", {}, 1),
        ("loramux_load_wait_seconds_count", {}, 1),
        ("loramux_load_wait_seconds_sum", {}, 0.3),
        ("loramux_queue_time_seconds_sum", {}, 0.002),
    ):
        assert prometheus.get_sample_value(series, {"adapter": "a", **labels}) == pytest.approx(expected), series


def test_gauges_are_exact_whoever_has_a_label(prometheus: CollectorRegistry) -> None:
    metrics = AdapterMetrics(prometheus, max_names=2)
    names = [f"a{i}" for i in range(50)]
    for name in names:
        bring_up(metrics, name)
        metrics.leases(name, 2)
        metrics.request_started(name)
    for gauge, each in (
        ("loramux_requests_in_flight", 1),
        ("loramux_adapter_leases", 2),
        ("loramux_adapter_resident_bytes", 100),
    ):
        assert prometheus.get_sample_value(gauge, {"adapter": "a0"}) == each
        assert prometheus.get_sample_value(gauge, {"adapter": "other"}) == 48 * each
    assert adapters(prometheus) == {"resident": 50}
    for name in names:
        metrics.request_ended(name, "stop", 1, 2)
        metrics.leases(name, 0)
        take_down(metrics, name)
    for gauge in ("loramux_requests_in_flight", "loramux_adapter_leases"):
        assert prometheus.get_sample_value(gauge, {"adapter": "other"}) == 0
    assert prometheus.get_sample_value("loramux_requests_in_flight", {"adapter": "a0"}) == 0
    assert resident_bytes(prometheus, "a0") is None and resident_bytes(prometheus, "other") is None
    count = "loramux_requests_total"
    assert prometheus.get_sample_value(count, {"adapter": "a0", "outcome": "stop"}) == 1
    assert prometheus.get_sample_value(count, {"adapter": "other", "outcome": "stop"}) == 48
    assert b"a49" not in generate_latest(prometheus)


def test_a_request_that_runs_while_its_label_is_taken(
    prometheus: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = AdapterMetrics(prometheus, max_names=1)
    now = 0.0
    monkeypatch.setattr(metrics.labels, "_clock", lambda: now)
    metrics.request_started("a")
    now = 400.0
    for _ in range(3):
        metrics.request_started("b")
    metrics.request_ended("a", "stop", 1, 1)
    in_flight = "loramux_requests_in_flight"
    assert prometheus.get_sample_value(in_flight, {"adapter": "a"}) is None
    assert prometheus.get_sample_value(in_flight, {"adapter": "b"}) == 3
    assert prometheus.get_sample_value(in_flight, {"adapter": "other"}) == 0
    assert prometheus.get_sample_value("loramux_requests_total", {"adapter": "other", "outcome": "stop"}) == 1


@pytest.mark.parametrize("length", [12, 128], ids=["usual names", "names as long as allowed"])
def test_a_thousand_resident_adapters_fit_on_the_page(
    prometheus: CollectorRegistry, metrics: AdapterMetrics, length: int
) -> None:
    names = [f"adapter-{i:04d}".ljust(length, "x") for i in range(1000)]
    for name in names:
        bring_up(metrics, name)
    for outcome, name in itertools.product(("stop", "length", "abort", "error"), names):
        use(metrics, name, outcome)
    page = generate_latest(prometheus)
    assert len(page) < LIMIT_BYTES
    assert page.count(b"loramux_requests_in_flight{") == 101
    assert adapters(prometheus) == {"resident": 1000}


def test_five_thousand_names_that_come_and_go_leave_nothing(
    prometheus: CollectorRegistry, metrics: AdapterMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(metrics.labels, "_clock", lambda: now)
    most = 0
    for i in range(5000):
        now += 7.0
        name = f"adapter-{i:04d}"
        bring_up(metrics, name)
        use(metrics, name)
        metrics.evicted(name)
        take_down(metrics, name)
        metrics.load_failed(name, "adapter_corrupt")
        if i % 250 == 0:
            most = max(most, len(generate_latest(prometheus)))
    assert most < LIMIT_BYTES
    now += 600.0
    generate_latest(prometheus)  # the scrape that finds them gone may still show them
    page = generate_latest(prometheus).decode()
    assert "adapter-" not in page
    assert adapters(prometheus) == {}


def test_pool_and_build(prometheus: CollectorRegistry, metrics: AdapterMetrics) -> None:
    used = 5
    metrics.watch_pool(1000, lambda: used, 70)
    used = 6
    for kind, expected in (("capacity", 1000), ("used", 6), ("overhead", 70)):
        assert prometheus.get_sample_value("loramux_adapter_pool_bytes", {"kind": kind}) == expected
    metrics.build_info("tiny-base")
    (info,) = [s for f in prometheus.collect() for s in f.samples if s.name == "loramux_build_info"]
    assert info.labels["version"] == loramux.__version__ and info.labels["base"] == "tiny-base"
    assert info.labels["torch"][0].isdigit() and info.labels["vllm"]
