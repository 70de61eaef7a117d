"""Debian's Prometheus, run beside a test, and the files of `docker/` that are meant for it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/loramux.json").read_text())

#: Grafana's variables, as Grafana would fill them in.
VARIABLES = {"$__rate_interval": "1m", "$__range": "30m", "$adapter": ".*"}


def binary(name: str) -> str:
    """`prometheus` or `promtool`; without it the test is skipped, but fails where .ci/run says it must be there."""
    if found := shutil.which(name, path=f"{os.environ['PATH']}:{REPOSITORY}/.venv/prometheus/usr/bin"):
        return found
    if os.environ.get("LORAMUX_CI"):
        pytest.fail(f"{name} is missing; `make prometheus` should have put it there")
    pytest.skip(f"needs {name}: run `make prometheus` (Debian), or put it on the PATH")


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels that show something: no rows."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """`(panel title: ref id, PromQL)` of every target, variables filled in."""
    found = []
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            found.append((f"{panel['title']}: {target['refId']}", expression))
    return found


class Prometheus:
    """A running Prometheus, asked over its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **parameters: str) -> Any:
        """`data` of a successful answer."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def vector(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every element of an instant vector."""
        data = self.ask("query", query=expression)
        assert data["resultType"] == "vector", expression
        return [(element["metric"], float(element["value"][1])) for element in data["result"]]

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.2)


@contextlib.contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the repository's own configuration, scraping `target` (host:port) every second."""
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DOCKER / file) for file in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [binary("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--storage.tsdb.path={folder / 'data'}"], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        prometheus = Prometheus(f"http://{address}")

        def answers() -> bool:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{prometheus.url}/-/ready", timeout=5).status_code == 200
            return False

        prometheus.wait(answers)
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
