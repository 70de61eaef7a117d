"""The files for Prometheus and Grafana fit each other and the metrics that exist."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from loramux.metrics import AdapterMetrics, ReliabilityMetrics, RoutingMetrics, UncertaintyMetrics
from loramux.registry import Store
from loramux.uncertainty.calibration import Calibrations
from loramux.uncertainty.recent import Recent

from .prometheus import DASHBOARD, DOCKER, binary, panels, queries

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def families() -> dict[str, str]:
    """Every family of ours, with its type."""
    registry = CollectorRegistry()
    labels = AdapterMetrics(registry).labels
    RoutingMetrics(labels, registry)
    UncertaintyMetrics(labels, registry)
    ReliabilityMetrics(labels, Recent(), Calibrations(Store.in_memory()), registry)
    return {family.name: family.type for family in registry.collect()}


def series_of(families: dict[str, str]) -> set[str]:
    """The series names of the families."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "summary": ["_sum", "_count"]}
    return {name + suffix for name, kind in families.items() for suffix in suffixes.get(kind, [""])}


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"]
    return list(group["rules"])


EXPRESSIONS = [*queries(), *((rule["alert"], rule["expr"]) for rule in alerts())]


@pytest.mark.parametrize("expression", [e for _, e in EXPRESSIONS], ids=[title for title, _ in EXPRESSIONS])
def test_queries_use_series_that_exist(expression: str, families: dict[str, str]) -> None:
    assert "$" not in expression, "a variable the test does not know"
    ours = set(re.findall(r"\bloramux_\w+", expression))
    assert ours <= series_of(families)
    assert ours or "vllm:" in expression or "up{" in expression


def test_every_family_is_on_the_dashboard(families: dict[str, str]) -> None:
    text = " ".join(expression for _, expression in queries())
    assert {name for name in families if name not in text} == set()


def test_panels_are_complete_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    cells = set()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        assert x + w <= 24
        taken = set(itertools.product(range(x, x + w), range(y, y + h)))
        assert not taken & cells, panel["title"]
        cells |= taken
    for panel in panels():
        assert panel["description"] and panel["targets"], panel["title"]
        assert all(t["datasource"]["uid"] == "${datasource}" for t in [panel, *panel["targets"]]), panel["title"]


def test_compose() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert {name for name, service in services.items() if "profiles" not in service} == {"loramux"}
    assert all(service.get("profiles", ["observe"]) == ["observe"] for service in services.values())
    for name, service in services.items():
        assert re.fullmatch(r"loramux:cpu|\S+:v?\d+\.\d+\.\d+", service["image"]), "an image without a fixed version"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in compose["volumes"], volume
    build = services["loramux"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).exists()


def test_provisioning_points_at_what_compose_mounts() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    grafana = compose["services"]["grafana"]
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in grafana["volumes"]}
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/loramux.yml").read_text())["providers"]
    assert (DOCKER / mounts[provider["options"]["path"]] / "loramux.json").exists()
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DOCKER / mounts[str(home.parent)] / home.name).exists()
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    scrape = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    assert "prometheus" in compose["services"] and source["url"] == "http://prometheus:9090"
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == ["loramux:8000"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", str(DOCKER / "prometheus.yml")],
        ["check", "rules", "--lint=all", "--lint-fatal", str(DOCKER / "alerts.yml")],
        ["test", "rules", str(HERE / "alerts.test.yml")],
    ],
    ids=["config", "rules", "what fires"],
)
def test_promtool(arguments: list[str]) -> None:
    done = subprocess.run([binary("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
