"""`POST /v1/uncertainty/calibrate`: items become requests, their scores a calibration; nothing is kept by halves."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from loramux.http import attach
from loramux.http.calibrate import AT_ONCE, Calibrate
from loramux.http.gate import Gate, install
from loramux.http.request_id import RequestId
from loramux.http.scored import ScoredCompletion
from loramux.http.uncertainty import UncertaintyReport
from loramux.uncertainty.calibration import Calibrations
from loramux.uncertainty.exchange import exchange
from loramux.uncertainty.recent import Recent

from ..fakes import BASE, World
from .guarded import ADMIN, KEY, TEAM, Inner, call, gate, guarded

PATH = "/v1/uncertainty/calibrate"


class Tokenizer:
    """A token a letter."""

    unk_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [*map(ord, text)]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Server:
    """Scores an answer by the number in its prompt; answers "broken" with an error, "slow" never."""

    def __init__(self) -> None:
        self.world = World()
        self.calibrations = Calibrations(self.world.store)
        self.recent = Recent()
        self.seen: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.running = self.most = 0
        app = FastAPI()
        for layer in (UncertaintyReport, ScoredCompletion, Calibrate, RequestId):
            app.add_middleware(layer)
        app.state.args = Namespace()
        install(app.state.args, Gate(bases=(BASE,)))
        app.state.loramux = SimpleNamespace(
            registry=self.world.registry, tokenizer=Tokenizer(), calibrations=self.calibrations, base=BASE,
            max_model_len=100, recent=self.recent,
        )  # fmt: skip
        attach(app)
        for path in ("/v1/chat/completions", "/v1/completions"):
            app.add_api_route(path, self.route, methods=["POST"])
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    async def load(self, name: str = "a", content: str = "", **more: Any) -> Any:
        version = await self.world.load(name, content, **more)
        assert version.artefact is not None
        version.artefact = replace(
            version.artefact, summary=replace(version.artefact.summary, bayesian=name != "plain")
        )
        return version

    async def route(self, request: Request) -> Any:
        body, asked = await request.json(), exchange.get()
        assert asked is not None and not asked.ask.calibrated
        self.seen.append(body)
        self.ids.append(request.headers["x-request-id"])
        prompt = body.get("prompt") or body["messages"][0]["content"]
        if prompt == "broken":
            return JSONResponse({"error": {"message": "too long", "hint": "Shorten it."}}, status_code=400)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0 if prompt != "slow" else 60)
        self.running -= 1
        x = float(prompt)
        head = {"mode": asked.mode.value, "noise": "sequence", "samples": asked.samples, "seed": asked.ask.seed}
        if asked.mode.value == "fast":
            head |= {"noise": None, "samples": 0}
        told = {**head, "partial": x < 0, "nll_ln": x, "total": x, "confidence": 0.9}
        if asked.ask.labels:
            told["labels"] = [{"label": label, "probability": 0.5} for label in asked.ask.labels]
        asked.choices = {0: told}
        return {"id": "c", "choices": [{"index": 0, "finish_reason": "stop", "message": {}}]}

    async def post(self, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(PATH, content=content, headers={"X-Request-Id": "r-1"})

    def kept(self) -> list[str]:
        return [row.id for row in self.world.store.calibrations("a")]


@pytest.fixture
async def server() -> Server:
    server = Server()
    await server.load()
    return server


def items(n: int = 40, **more: Any) -> list[dict[str, Any]]:
    """Wrong above the middle, but for one of five."""
    return [
        {"prompt": str(i / 10), "completion": "text", "correct": (i < n / 2) != (i % 5 == 0), **more} for i in range(n)
    ]


XY = {"mode": "decide", "labels": ["x", "y"]}


async def test_items_are_scored_and_the_answer_is_a_card(server: Server) -> None:
    answer = await server.post({"model": "a", "uncertainty": {"samples": 4}, "data": items()})
    card = answer.json()
    assert answer.status_code == 200, card
    assert (card["object"], card["model"], card["n"]) == ("calibration", "a", 40)
    settings = {"mode": "score", "noise": "sequence", "samples": 4, "seed": 0}
    assert (
        card["settings"] == settings
        and card["score"] == "nll_ln"
        and card["version"] == server.world.current("a").digest
    )
    assert 0 <= card["ece"] <= 1 and card["evaluated"] == "5-fold cross-validation" and card["before"]["ece"] > 0
    assert server.kept() == [card["id"]] and 1 < server.most <= AT_ONCE
    assert {body["model"] for body in server.seen} == {server.world.current("a").tag}
    assert all("uncertainty" not in body and "completion" not in body for body in server.seen)
    assert sorted(server.ids) == sorted(f"r-1-{i}" for i in range(40))
    adapter = (await server.client.get("/v1/adapters/a")).json()
    assert [one["id"] for one in adapter["calibrations"]] == [card["id"]]
    model = (await server.client.get("/v1/models/a")).json()["adapter"]["calibrations"]
    assert model == [{"id": card["id"], "method": card["method"], "n": 40, "ece": card["ece"]}]
    answer = await server.client.delete(f"/v1/uncertainty/calibrations/{card['id']}")
    assert answer.json()["deleted"] and answer.json()["model"] == "a" and not server.kept()
    answer = await server.client.delete(f"/v1/uncertainty/calibrations/{card['id']}")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "calibration_not_found"


async def test_decisions(server: Server) -> None:
    data = [{"messages": [{"role": "user", "content": str(i)}], "label": "ab"[i % 2]} for i in range(40)]
    wish = {"model": "a", "uncertainty": {"mode": "decide", "labels": ["b", "a"]}, "data": data, "sets": "aps"}
    card = (await server.post(wish)).json()
    assert card["settings"]["labels"] == ["a", "b"] and card["sets"] == "aps" and card["score"] == "total"
    assert set(card["compared"]) == {"temperature", "platt", "isotonic"} and card["settings"]["samples"] == 8


async def test_an_adapter_without_a_posterior(server: Server) -> None:
    await server.load("plain")
    card = (await server.post({"model": "plain", "data": items()})).json()
    assert card["settings"] == {"mode": "fast", "noise": None, "samples": 0, "seed": None}


async def test_scores_of_before_need_no_engine(server: Server) -> None:
    alone = [{"score": float(i["prompt"]), "correct": i["correct"]} for i in items()]
    assert (await server.post({"model": "a", "data": alone, "method": "platt"})).json()["method"] == "platt"
    head = {"mode": "score", "noise": "sequence", "samples": 8, "seed": 0, "partial": False, "confidence": 0.5}
    told = [{"uncertainty": {**head, "mi_max": i["score"]}, "correct": i["correct"]} for i in alone]
    card = (await server.post({"model": "a", "data": told, "score": "mi_max"})).json()
    assert card["score"] == "mi_max" and not server.seen and server.kept() == [card["id"]]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"model": BASE}, "model"),
        ({"surprise": 1}, "surprise"),
        ({"data": []}, "data"),
        ({"data": {}}, "data"),
        ({"data": [{"score": 0.1, "correct": True}] * 10_001}, "data"),
        ({"data": items(20)}, "data"),
        ({"data": items(correct=True)}, "data"),
        ({"data": [*items(), 7]}, "data[40]"),
        ({"data": [*items(), {"prompt": "1", "correct": True}]}, "data[40]"),
        ({"data": [*items(), {"prompt": "1", "messages": [], "completion": "x", "correct": True}]}, "data[40]"),
        ({"data": [*items(), {"prompt": "1", "completion": "x"}]}, "data[40].correct"),
        ({"data": [*items(), {"prompt": "1", "completion": "x", "correct": 1}]}, "data[40].correct"),
        ({"data": [*items(), {"prompt": "1", "completion": "x", "label": "a"}]}, "data[40].correct"),
        ({"data": [*items(), {"score": 1.0, "correct": True}]}, "data"),
        ({"data": [{"score": float("nan"), "correct": True}]}, "data[0].score"),
        ({"data": [{"score": 10**400, "correct": True}]}, "data[0].score"),
        ({"data": [{"score": "1", "correct": True}]}, "data[0].score"),
        ({"data": [{"uncertainty": 1, "correct": True}]}, "data[0].uncertainty"),
        ({"data": [{"uncertainty": {}, "correct": True}] * 40}, "data[0]"),
        ({"data": [{"uncertainty": {"mode": []}, "correct": True}] * 40}, "data[0]"),
        ({"data": [*items(), {"prompt": "broken", "completion": "x", "correct": True}]}, "data[40]"),
        ({"data": [*items(), {"prompt": ["1", "2"], "completion": "x", "correct": True}]}, "data[40]"),
        ({"method": "magic"}, "method"),
        ({"method": ["platt"]}, "method"),
        ({"method": "temperature"}, "method"),
        ({"sets": "raps"}, "sets"),
        ({"risk": 0}, "risk"),
        ({"risk": True}, "risk"),
        ({"score": "confidence"}, "score"),
        ({"score": "vibes"}, "score"),
        ({"score": ["nll_ln"]}, "score"),
        ({"uncertainty": {"mode": "sample"}}, "uncertainty.mode"),
        ({"uncertainty": {"mode": "off"}}, "uncertainty.mode"),
        ({"uncertainty": {"samples": 1}}, "uncertainty.samples"),
        ({"uncertainty": {"per_token": True}}, "uncertainty.per_token"),
        ({"uncertainty": {"noise": "token"}}, "uncertainty.noise"),
        ({"uncertainty": XY}, "data[0].label"),
        ({"uncertainty": XY, "data": [{"prompt": "1", "label": "z"}]}, "data[0].label"),
    ],
)  # fmt: skip
async def test_what_cannot_be_calibrated_is_refused_with_a_hint(server: Server, change: Any, param: str) -> None:
    answer = await server.post({"model": "a", "data": items(), **change})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and error["hint"], error
    assert not server.kept()


@pytest.mark.parametrize("body", [b"", b"[]", b"no json", b"[" * 10**5, b'{"model": "a"}'])
async def test_bodies_that_are_none(server: Server, body: bytes) -> None:
    answer = await server.post(body)
    assert answer.status_code == 400 and answer.json()["error"]["hint"]


async def test_items_that_the_engine_did_not_read_to_the_end(server: Server) -> None:
    answer = await server.post({"model": "a", "data": [*items(), {"prompt": "-1", "completion": "x", "correct": True}]})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "items_not_scored" and not server.kept()
    assert answer.json()["error"]["param"] == "data[40]" and answer.headers["retry-after"]


async def test_an_adapter_that_nobody_has(server: Server) -> None:
    answer = await server.post({"model": "nobody", "data": items()})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


async def test_a_client_that_leaves_ends_it(server: Server) -> None:
    left = asyncio.Event()
    body = json.dumps({"model": "a", "data": items(prompt="slow")}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    task = asyncio.create_task(call(server.client._transport.app, "POST", PATH, receive=receive))  # type: ignore[attr-defined]
    while server.running < AT_ONCE:
        await asyncio.sleep(0.001)
    left.set()
    async with asyncio.timeout(5):
        answer = await task
    assert answer.status is None and not server.kept() and len(server.seen) == AT_ONCE


@pytest.mark.parametrize(("key", "status"), [(None, 401), (KEY, 403), (TEAM, 403), (ADMIN, 200)])
@pytest.mark.parametrize(
    ("method", "path"), [("DELETE", "/v1/uncertainty/calibrations/cal-0"), ("POST", "//v1/uncertainty//calibrate/")]
)
async def test_it_needs_the_admin_key(key: str | None, status: int, method: str, path: str) -> None:
    inner = Inner()
    answer = await call(guarded(inner, gate()), method, path, key=key)
    assert answer.status == status and bool(inner.scopes) == (status == 200)


async def test_feedback_is_labelled_data(server: Server) -> None:
    digest = server.world.current("a").artefact.digest  # type: ignore[union-attr]
    head = {"mode": "decide", "noise": "sequence", "samples": 8, "seed": 0, "partial": False}
    for i in range(90):
        told = {
            **head, "total": i / 90, "confidence": 0.6, "prediction": "x",
            "labels": [{"label": "x", "probability": 0.6}, {"label": "y", "probability": 0.4}],
        }  # fmt: skip
        one = server.recent.add("a", digest, told, ("x", "y"), 0.6)
        assert one is not None
        server.recent.call(one, [f"r{i}"], 0)
        if i in (29, 89):
            wish = {"model": "a", "from": "feedback", "uncertainty": XY}
            answer = await server.post(wish)
            assert (answer.status_code, answer.json().get("n")) == ((400, None) if i == 29 else (200, 89))
        server.recent.feedback(f"r{i}", 0, ["a"], correct=None, label="xy"[i % 3 == 0])
    assert not server.seen and len(server.kept()) == 1
    for body in ({"from": "elsewhere"}, {"from": "feedback", "data": items()}):
        assert (await server.post({"model": "a", **body})).json()["error"]["param"] == "from"
    assert (await server.post({"model": "a", "from": "feedback"})).status_code == 400  # under other settings
