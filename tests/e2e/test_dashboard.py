"""Every query of the Grafana dashboard, on a real Prometheus that scraped a real server under traffic."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from loramux.metrics.reliability import MIN_RECENT
from loramux_adapters import BaseModel

from ..docker.prometheus import DASHBOARD, Prometheus, queries, scraping
from . import bayesian

pytestmark = pytest.mark.engine

BASE = "smollm2-135m-instruct"
MODELS = (BASE, "sarcasm", "spam")
MIXTURE = "desk"
DECIDE = {"mode": "decide", "labels": ["spam", "ham"]}
EXPRESSIONS = dict(queries())
#: Queries without data after this traffic, and why.
NO_DATA = {"Loads and evictions: B": "nothing is evicted: everything fits into the pool"}
TRAFFIC_S, ROUNDS = 90, 3

Answers = dict[str, list[float]]


@pytest.fixture(scope="module")
def answers() -> Answers:
    """What each query gave when it first gave numbers: a rate is nothing again a minute later."""
    return {}


@pytest.fixture(scope="module")
def prometheus(
    server: Any, spare_adapters: Any, base_model: BaseModel, answers: Answers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Scraped while rounds of traffic went on until every query had an answer, or long enough."""
    broken = spare_adapters / "observed-broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    doubt = bayesian.write(bayesian.make(base_model, sigma=0.05, seed=1), base_model, spare_adapters / "d.safetensors")
    assert _put(server, "doubt", doubt).is_success
    _calibrate(server)
    with scraping(server.url.removeprefix("http://"), tmp_path_factory.mktemp("prometheus")) as prometheus:
        _await_scrapes(prometheus)
        deadline = time.monotonic() + TRAFFIC_S
        # A counter that begins with its first event has no rate before the second: several rounds, however slow.
        for done in itertools.count():
            if answers.keys() | NO_DATA.keys() >= EXPRESSIONS.keys():
                break
            if done >= ROUNDS and time.monotonic() > deadline:
                break
            for model in (*MODELS, MIXTURE):
                _complete(server, model)
            _doubt(server)
            assert _put(server, "observed", spare_adapters / "spare0", wait_s=0).is_success
            _complete(server, "observed")  # waits until it is loaded
            assert _put(server, "refused", broken).is_error
            assert httpx.delete(f"{server.url}/v1/adapters/observed").is_success
            _await_scrapes(prometheus)
            for title in EXPRESSIONS.keys() - answers.keys():
                numbers = _numbers(prometheus, title)
                if numbers and all(map(math.isfinite, numbers)):  # a share of no requests is none yet
                    answers[title] = numbers
        for name in ("refused", "doubt"):
            httpx.delete(f"{server.url}/v1/adapters/{name}")
        yield prometheus


def _complete(server: Any, model: str) -> None:
    body = {"model": model, "prompt": "The lighthouse keeper wrote that", "max_tokens": 12, "ignore_eos": True}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text


def _calibrate(server: Any) -> None:
    """Decisions of `spam`, by scores of which the larger ones are wrong; and as many of them as drift is told of."""
    data = [{"score": i / 60, "correct": i < 30} for i in range(40)]
    card = server.post("/v1/uncertainty/calibrate", {"model": "spam", "uncertainty": DECIDE, "data": data})
    assert card.status_code == 200, card.text
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: _decide(server, i), range(MIN_RECENT)))


def _decide(server: Any, i: int) -> None:
    answer = server.post(
        "/v1/completions", {"model": "spam", "prompt": f"{i} times free", "uncertainty": DECIDE}
    ).json()
    given = server.post("/v1/uncertainty/feedback", {"id": answer["id"], "correct": i % 3 > 0})
    assert given.status_code == 200, given.text


def _doubt(server: Any) -> None:
    """An answer that draws read, and nobody may trust."""
    asked = {"model": "doubt", "prompt": "The lighthouse keeper wrote that", "max_tokens": 4}
    asked["uncertainty"] = {"samples": 2, "abstain_above": {"score": "total", "value": 0}}
    assert server.post("/v1/completions", asked).json()["choices"][0]["uncertainty"]["abstained"]


def _put(server: Any, name: str, source: Any, wait_s: float = 30) -> httpx.Response:
    url = f"{server.url}/v1/adapters/{name}"
    return httpx.put(url, params={"wait": wait_s}, json={"source": str(source)}, timeout=60)


def _await_scrapes(prometheus: Prometheus) -> None:
    """Two more: the first may have begun before now."""

    def scrapes() -> float:
        return sum(value for _, value in prometheus.vector('count_over_time(up{job="loramux"}[30m])'))

    before = scrapes()
    prometheus.wait(lambda: scrapes() >= before + 2)


def _numbers(prometheus: Prometheus, title: str) -> list[float]:
    """The values that a query gives. A quantile of nothing, of an adapter without traffic, is no number."""
    values = [value for _, value in prometheus.vector(EXPRESSIONS[title])]
    if "histogram_quantile" in EXPRESSIONS[title]:
        values = [value for value in values if not math.isnan(value)]
    return values


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_query(prometheus: Prometheus, answers: Answers, title: str) -> None:
    numbers = answers.get(title) or _numbers(prometheus, title)
    assert numbers or title in NO_DATA, EXPRESSIONS[title]
    assert all(map(math.isfinite, numbers)), numbers


def test_panels_per_adapter_show_every_adapter(prometheus: Prometheus) -> None:
    for title, expression in EXPRESSIONS.items():
        if re.match(r"(Requests by adapter|Time to first|Inter-token)", title):
            assert {labels["adapter"] for labels, _ in prometheus.vector(expression)} >= {*MODELS, MIXTURE}, title


def test_the_experts_of_a_mixture_share_the_load(prometheus: Prometheus) -> None:
    shares = prometheus.vector(EXPRESSIONS["Expert load: A"])
    by_expert = {labels["expert"]: share for labels, share in shares if labels["adapter"] == MIXTURE}
    assert len(by_expert) > 1 and sum(by_expert.values()) == pytest.approx(1)
    entropy = {labels["adapter"]: value for labels, value in prometheus.vector(EXPRESSIONS["Router entropy: A"])}
    assert 0 <= entropy[MIXTURE] <= math.log(len(by_expert)) + 1e-6


def test_the_adapter_variable_lists_the_adapters(prometheus: Prometheus) -> None:
    (variable,) = [v for v in DASHBOARD["templating"]["list"] if v["name"] == "adapter"]
    metric, label = re.findall(r"\w+", variable["query"]["query"].removeprefix("label_values"))
    values = prometheus.ask(f"label/{label}/values", **{"match[]": metric})
    assert {*MODELS, MIXTURE, "other"} <= set(values)
    two = prometheus.vector('sum by (adapter) (loramux_requests_in_flight{adapter=~"sarcasm|spam"})')
    assert len(two) == 2


def test_alert_rules_can_be_evaluated(prometheus: Prometheus) -> None:
    (group,) = prometheus.ask("rules")["groups"]
    assert {rule["name"]: rule["health"] for rule in group["rules"] if rule["health"] != "ok"} == {}


def test_the_page_is_small(prometheus: Prometheus, server: Any) -> None:
    page = server.get("/metrics")
    assert page.status_code == 200 and len(page.content) < 500_000
    assert page.text.count("vllm:lora_requests_info{") <= 1
