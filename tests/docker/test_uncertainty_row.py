"""The dashboard's row on uncertainty, on a real Prometheus that scraped our metrics, fed without an engine."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, start_http_server

from loramux.metrics import AdapterMetrics, ReliabilityMetrics, UncertaintyMetrics
from loramux.registry import Store
from loramux.registry.store import SavedCalibration
from loramux.uncertainty.ask import Mode
from loramux.uncertainty.calibration import Calibrations, Method, Sets, Settings, calibrate, of_scores
from loramux.uncertainty.recent import Recent

from .prometheus import DASHBOARD, Prometheus, queries, scraping

HEAD = {"mode": "score", "noise": "sequence", "samples": 8, "seed": 0, "partial": False}


def row() -> dict[str, str]:
    """The queries of its panels."""
    titles: list[str] = []
    inside = False
    for panel in DASHBOARD["panels"]:
        inside = panel["title"] == "Uncertainty" if panel["type"] == "row" else inside
        titles += [panel["title"]] if inside and panel["type"] != "row" else []
    return {title: expression for title, expression in queries() if title.rpartition(":")[0] in titles}


EXPRESSIONS = row()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    registry, store, recent = CollectorRegistry(), Store.in_memory(), Recent()
    adapters = AdapterMetrics(registry)
    uncertainty = UncertaintyMetrics(adapters.labels, registry)
    ReliabilityMetrics(adapters.labels, recent, Calibrations(store), registry)
    x = np.linspace(0, 1, 200)
    items = of_scores("nll_ln", x.tolist(), (x < 0.5).tolist())
    asked: dict[str, Any] = {"score": "nll_ln", "method": Method.PLATT, "sets": Sets.LAC, "risk": 0.1}
    made = calibrate(items, Settings(Mode.SCORE, "sequence", 8, 0), **asked)
    store.keep_calibration(SavedCalibration(made.id, "a", "d", made.dumped()))
    ended = threading.Event()

    def answer() -> None:
        for i in range(10**6):
            told = {**HEAD, "nll_ln": i % 50 / 50, "total": 1.0, "epistemic": 0.1, "confidence": i % 10 / 10}
            uncertainty.told("a", {**told, "action": "flag"}, 0.1)
            uncertainty.read("a", 80)
            adapters.drawn("a", 6, 2)
            one = recent.add("a", "d", told, (), told["confidence"])
            assert one is not None
            recent.call(one, ["r"], 0)
            recent.feedback("r", 0, ["a"], correct=i % 3 > 0, label=None)
            if ended.wait(0.005):
                return

    thread = threading.Thread(target=answer)
    thread.start()
    server, _ = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        target = f"127.0.0.1:{server.server_port}"
        with scraping(target, tmp_path_factory.mktemp("prometheus")) as prometheus:
            prometheus.wait(lambda: all(prometheus.vector(expression) for expression in EXPRESSIONS.values()))
            yield prometheus
    finally:
        ended.set()
        thread.join()
        server.shutdown()


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_query(prometheus: Prometheus, title: str) -> None:
    found = prometheus.vector(EXPRESSIONS[title])
    assert found and all(labels["adapter"] == "a" and math.isfinite(value) for labels, value in found)


def test_values(prometheus: Prometheus) -> None:
    (drawn,) = prometheus.vector(EXPRESSIONS["Draws on the device: A"])
    assert drawn[1] == pytest.approx(0.75)
    means = {labels["score"]: value for labels, value in prometheus.vector(EXPRESSIONS["Mean scores: A"])}
    assert means["total"] == pytest.approx(1.0) and means["epistemic"] == pytest.approx(0.1)
    (drift,) = prometheus.vector(EXPRESSIONS["Drift: A"])
    assert drift[0] == {"adapter": "a", "score": "nll_ln"} and 0 <= drift[1] < 0.25


def test_the_row_is_all_there() -> None:
    assert len({title.rpartition(":")[0] for title in EXPRESSIONS}) == 12
