"""Who has a label: bounded, by traffic, and never at the price of a counter that falls."""

from __future__ import annotations

from collections import Counter as Tally

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from loramux.metrics.labels import OTHER, Labels

MINUTES = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def labels(clock: Clock) -> Labels:
    """Two labels, taken by `a` and `b`."""
    labels = Labels(2, clock=clock)
    for name in ("a", "b"):
        labels.requested(name)
    return labels


def test_free_labels_go_to_whoever_comes_first(labels: Labels) -> None:
    assert [labels.label(name) for name in ("a", "b", "c")] == ["a", "b", OTHER]
    assert labels.held == ("a", "b")


def test_a_busier_name_takes_the_label_of_the_least_used_one(labels: Labels, clock: Clock) -> None:
    labels.requested("b")
    clock.now += 6 * MINUTES
    labels.requested("c")
    assert labels.label("c") == OTHER  # as busy as `a`, but not twice as busy
    labels.requested("c")
    assert labels.held == ("b", "c")
    assert labels.label("a") == OTHER


def test_a_label_is_held_for_five_minutes_at_least(labels: Labels, clock: Clock) -> None:
    for _ in range(100):
        labels.requested("c")
    assert labels.label("c") == OTHER
    clock.now += 5 * MINUTES
    labels.requested("c")
    assert labels.label("c") == "c"


def test_old_traffic_counts_less(labels: Labels, clock: Clock) -> None:
    for _ in range(100):
        labels.requested("a")
    clock.now += 80 * MINUTES  # eight half-lives: 101 requests are worth 0.4
    labels.requested("b")
    labels.requested("c")
    assert labels.held == ("b", "c")


def test_a_name_that_was_only_loaded_gives_way_to_one_that_is_used(clock: Clock) -> None:
    labels = Labels(1, clock=clock)
    assert labels.label("loaded") == "loaded"
    clock.now += 5 * MINUTES
    labels.requested("used")
    assert labels.held == ("used",)


def test_a_name_that_is_gone_gives_its_label_back(labels: Labels, clock: Clock) -> None:
    labels.gone("a")
    clock.now += 4 * MINUTES
    labels.expire()
    assert labels.label("a") == "a"  # a scrape may still want its last counts
    clock.now += 1 * MINUTES
    labels.expire()
    assert labels.held == ("b",)
    assert labels.label("c") == "c"


def test_a_name_that_comes_back_in_time_keeps_its_label(labels: Labels, clock: Clock) -> None:
    labels.gone("a")
    labels.back("a")
    clock.now += 60 * MINUTES
    labels.expire()
    assert labels.held == ("a", "b")


def test_an_adapter_called_other_has_no_label_of_its_own(clock: Clock) -> None:
    registry = CollectorRegistry()
    counter = Counter("events", "-", ["adapter"], registry=registry)
    labels = Labels(2, clock=clock)
    labels.requested(OTHER)
    labels.series(counter, OTHER).inc()
    assert labels.held == ()
    labels.gone(OTHER)
    clock.now += 60 * MINUTES
    labels.expire()
    assert registry.get_sample_value("events_total", {"adapter": OTHER}) == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["request", "request", "request", "gone", "back"]),
            st.sampled_from(["a", "b", "c", "d", "e", OTHER]),
            st.sampled_from([0.0, 30.0, 400.0]),
        ),
        max_size=60,
    )
)
def test_counters_never_fall_and_lose_nothing(events: list[tuple[str, str, float]]) -> None:
    """Whatever happens: labels are bounded, and every event is counted in one series that only grows or ends."""
    registry, clock = CollectorRegistry(), Clock()
    counter = Counter("events", "-", ["adapter"], registry=registry)
    labels = Labels(2, clock=clock)
    shown: dict[str, float] = {}
    ended: Tally[str] = Tally()
    count = 0
    for kind, name, pause in events:
        clock.now += pause
        if kind == "request":
            count += 1
            labels.requested(name)
            labels.series(counter, name).inc()
        elif kind == "gone":
            labels.gone(name)
        else:
            labels.back(name)
        now = {s.labels["adapter"]: s.value for f in registry.collect() for s in f.samples if s.name == "events_total"}
        assert len(now) <= 3 and len(labels.held) <= 2
        for label, value in shown.items():
            if label not in now:
                assert label != OTHER
                ended[label] += value
            elif now[label] < value:  # ended and began again in one event
                assert now[label] == 1 and label == name and label != OTHER
                ended[label] += value
        shown = now
    assert sum(shown.values()) + sum(ended.values()) == count
