"""`"uncertainty"` in a completion request: what the engine's side is given, and what comes with the answer."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import AsyncIterator
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from loramux.errors import AnswerNotFound
from loramux.http.composition import Composed, answered_by
from loramux.http.gate import Gate, install
from loramux.http.scored import ScoredCompletion
from loramux.http.uncertainty import UncertaintyReport
from loramux.uncertainty.ask import Mode
from loramux.uncertainty.exchange import Exchange, exchange
from loramux.uncertainty.recent import Recent, Scored

from ..fakes import BASE, World

TOKENS = [{"total": 1.0, "aleatoric": 0.7, "epistemic": 0.3}] * 2
TOLD = {"mode": "score", "epistemic": 0.3, "tokens": TOKENS}


class Server:
    """An app whose route answers as vLLM's, filling the exchange where it runs, as the engine's side does."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.seen: list[tuple[dict[str, Any], Exchange | None]] = []
        self.paths: list[str] = []
        self.recent = Recent()
        head = {"mode": "score", "noise": "sequence", "samples": 8, "seed": 0, "partial": False}
        scored = self.recent.add("bayes", "d", head, (), 0.5)
        assert scored is not None
        self.scored: Scored = scored
        self.score = 0.3
        self.lengths: list[tuple[int, int]] = []
        app = FastAPI()
        app.add_middleware(UncertaintyReport)
        app.add_middleware(ScoredCompletion)
        app.state.args = Namespace()
        install(app.state.args, Gate(bases=(BASE,)))
        app.state.loramux = SimpleNamespace(registry=world.registry, tokenizer=Tokenizer(), recent=self.recent)
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            app.add_api_route(path, self.route, methods=["POST"])
        self.app = app

    async def route(self, request: Request) -> Any:
        raw = await request.body()
        self.lengths.append((int(request.headers["content-length"]), len(raw)))
        self.paths.append(request.url.path)
        body, asked = json.loads(raw), exchange.get()
        self.seen.append((body, asked))
        if body.get("model") == "broken":
            return JSONResponse({"error": {"message": "no"}}, status_code=400)
        n = body.get("n") or 1
        usage = {"prompt_tokens": 3}
        if asked is not None:
            asked.choices = {i: {**TOLD, "index": i} for i in range(n)}
            if (rule := asked.ask.abstain) is not None:  # the first of several choices is sure
                for i, told in asked.choices.items():
                    told |= rule.judged({rule.score: self.score if n == 1 or i else -1})
            asked.tokens = 40
            asked.scored = {i: self.scored for i in range(n)}
        if not body.get("stream"):
            logprobs = {"content": [{"token": "a"}, {"token": "b"}]} if body.get("logprobs") else None
            text = {"text": "said"} if "prompt" in body else {"message": {"role": "assistant", "content": "said"}}
            choices = [{"index": i, "logprobs": logprobs, "finish_reason": "stop", **deepcopy(text)} for i in range(n)]
            return {"id": "c", "model": body.get("model"), "choices": choices, "usage": usage}

        async def events() -> AsyncIterator[str]:
            for finish in (None, "stop"):
                for i in range(n):
                    yield f"data: {json.dumps({'id': 'c', 'choices': [{'index': i, 'finish_reason': finish}]})}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def post(self, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content, headers={"Content-Type": "application/json"})

    async def ask(self, uncertainty: Any, **body: Any) -> httpx.Response:
        return await self.post({"model": "bayes", "messages": [], "uncertainty": uncertainty, **body})

    @property
    def asked(self) -> Exchange:
        found = self.seen[-1][1]
        assert found is not None
        return found


class Tokenizer:
    """A token a letter."""

    unk_token_id = ord("?")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [*map(ord, text)]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture
async def server() -> Server:
    world = World(capacity=10_000)
    for name in ("bayes", "plain"):
        version = await world.load(name)
        assert version.artefact is not None
        summary = replace(version.artefact.summary, bayesian=name == "bayes")
        version.artefact = replace(version.artefact, summary=summary)
    return Server(world)


async def test_every_choice_gets_its_own(server: Server) -> None:
    answer = await server.ask({"samples": 4, "per_token": True}, n=2, logprobs=True)
    assert answer.status_code == 200 and int(answer.headers["content-length"]) == len(answer.content)
    for i, choice in enumerate(answer.json()["choices"]):
        assert choice["uncertainty"] == TOLD | {"index": i}
        assert [entry["uncertainty"] for entry in choice["logprobs"]["content"]] == TOKENS
    assert answer.json()["usage"] == {"prompt_tokens": 3, "uncertainty_tokens": 40}
    body, asked = server.seen[-1]
    assert "uncertainty" not in body and body["n"] == 2
    assert asked is not None and asked.samples == 4 and asked.mode is Mode.SCORE and asked.ask.per_token
    assert all(told == real for told, real in server.lengths)


async def test_in_a_stream_it_comes_with_the_end_of_each_choice(server: Server) -> None:
    answer = await server.ask({}, n=2, stream=True)
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    told = [choice.get("uncertainty") for event in events for choice in event["choices"]]
    assert told == [None, None, TOLD | {"index": 0}, TOLD | {"index": 1}]
    assert "uncertainty" not in events[0]["choices"][0]
    assert events[-1]["usage"]["uncertainty_tokens"] == 40 and answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [{}, {"uncertainty": None}, {"uncertainty": False}, {"uncertainty": {"mode": "off"}}])
async def test_who_does_not_ask_gets_the_answer_as_it_is(server: Server, asked: dict[str, Any], stream: bool) -> None:
    answer = await server.post({"model": "bayes", "stream": stream, "user": '"uncertainty"', **asked})
    assert answer.status_code == 200 and "uncertainty" not in answer.text
    assert server.seen[-1][1] is None and "uncertainty" not in server.seen[-1][0]
    assert exchange.get() is None


async def test_other_spellings_of_the_field_are_seen(server: Server) -> None:
    body = b'{"model": "bayes", "\\u0075ncertainty": {"samples": 0}}'
    assert (await server.post(body)).status_code == 400


async def test_other_routes_and_bodies_that_are_no_json_pass(server: Server) -> None:
    assert (await server.ask({"samples": 0})).status_code == 400
    body = {"uncertainty": {"samples": 0}}
    assert (await server.post(body, "/v1/embeddings")).status_code == 200
    with pytest.raises(json.JSONDecodeError):
        await server.post(b'{"uncertainty": {"samples": 0}')


@pytest.mark.parametrize(
    ("model", "mode"), [("bayes", Mode.SCORE), ("plain", Mode.FAST), (BASE, Mode.FAST), (None, Mode.FAST)]
)
async def test_what_answers_decides_how(server: Server, model: str | None, mode: Mode) -> None:
    assert (await server.ask({}, model=model)).status_code == 200
    assert server.asked.mode is mode


async def test_a_name_that_nobody_has_is_the_routes_business(server: Server) -> None:
    assert (await server.ask({}, model="nobody")).status_code == 200
    assert (await server.ask({}, model="broken")).json() == {"error": {"message": "no"}}


async def test_a_sum_is_what_it_is_made_of(server: Server) -> None:
    token = answered_by.set(Composed(server.world.current("bayes"), BASE))
    try:
        await server.ask({}, model=BASE)
    finally:
        answered_by.reset(token)
    assert server.asked.mode is Mode.SCORE


async def test_labels_are_tokens_for_the_engine(server: Server) -> None:
    await server.ask({"mode": "decide", "labels": ["a", "no"]})
    assert server.asked.labels == ((97,), (110, 111)) and server.asked.samples == 8
    answer = await server.ask({"mode": "decide", "labels": ["yes", "?"]})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "uncertainty.labels[1]"


@pytest.mark.parametrize(
    ("asked", "body", "n"),
    [({}, {}, 8), ({"samples": 4}, {}, 4), ({}, {"n": 3}, 3), ({"samples": 3}, {"n": 3}, 3), ({}, {"n": 1}, 8)],
)
async def test_samples_are_choices(server: Server, asked: Any, body: Any, n: int) -> None:
    answer = await server.ask({"mode": "sample", **asked}, **body)
    assert len(answer.json()["choices"]) == n == server.asked.samples == server.seen[-1][0]["n"]
    assert not server.asked.greedy and "temperature" not in server.seen[-1][0]


async def test_greedy_samples(server: Server) -> None:
    """vLLM refuses several choices with a temperature of 0, which here are not the same."""
    await server.ask({"mode": "sample", "samples": 2}, temperature=0)
    assert server.asked.greedy and server.seen[-1][0]["temperature"] == 1.0


@pytest.mark.parametrize(
    ("asked", "body", "param"),
    [
        ({"samples": 0}, {}, "uncertainty.samples"),
        ({"samples": 10}, {}, "uncertainty.samples"),  # no room: the adapter takes a tenth
        ({"mode": "sample", "samples": 4}, {"n": 3}, "n"),
        ({"mode": "sample"}, {"n": 65}, "n"),
        ({"mode": "sample"}, {"n": "4"}, "n"),
        ({"mode": "sample"}, {"n": 2.0}, "n"),
        ({"mode": "decide", "labels": ["a", "bc"]}, {"n": 2}, "n"),
        ({"mode": "decide", "labels": ["a", "bc"]}, {"logprobs": True}, "logprobs"),
        ({"mode": "decide", "labels": ["a", "bc"]}, {"echo": True}, "echo"),
        ({}, {"use_beam_search": True}, "use_beam_search"),
        ({}, {"prompt": ["one", "two"]}, "prompt"),
        ({}, {"prompt": [[1, 2], [3]]}, "prompt"),
    ],
)
async def test_what_cannot_be_carried_out_is_refused_before_anything_is_sent(
    server: Server, asked: Any, body: Any, param: str
) -> None:
    for stream in (False, True):
        answer = await server.ask(asked, stream=stream, **body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
        assert answer.json()["error"]["hint"]
    assert not server.seen


async def test_an_adapter_without_a_posterior_is_refused_if_asked(server: Server) -> None:
    answer = await server.ask({"mode": "score", "on_unsupported": "error"}, model="plain")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "adapter_not_bayesian"


async def test_a_prompt_of_tokens_is_one(server: Server) -> None:
    assert (
        await server.post({"model": "bayes", "prompt": [1, 2, 3], "uncertainty": True}, "/v1/completions")
    ).is_success


SCORE = "/v1/uncertainty/score"


@pytest.mark.parametrize(
    ("body", "path"),
    [({"messages": []}, "/v1/chat/completions"), ({"prompt": "Why?"}, "/v1/completions")],
)
async def test_an_answer_that_was_written_elsewhere(server: Server, body: dict[str, Any], path: str) -> None:
    sent = {"model": "bayes", "completion": "ab", "uncertainty": {"samples": 4}, **body}
    answer = await server.post(sent, SCORE)
    assert answer.json()["choices"][0]["uncertainty"] == TOLD | {"index": 0}
    seen, asked = server.seen[-1]
    assert seen == {"model": "bayes", "max_tokens": 1, **body} and server.paths[-1] == path
    assert asked is not None and (asked.text, asked.given, asked.samples) == ("ab", (97, 98), 4)
    del sent["uncertainty"]
    await server.post({**sent, "model": "plain"}, SCORE)
    assert server.asked.mode is Mode.FAST


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"completion": None}, "completion"),
        ({"completion": ""}, "completion"),
        ({"completion": ["a"]}, "completion"),
        ({"messages": []}, "messages"),  # beside a prompt
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"uncertainty": {"mode": "sample"}}, "uncertainty.mode"),
        ({"uncertainty": {"mode": "decide", "labels": ["a", "b"]}}, "uncertainty.mode"),
        ({"uncertainty": {"mode": "off"}}, "uncertainty.mode"),
        ({"uncertainty": {"samples": 1}}, "uncertainty.samples"),
        ({"prompt": ["one", "two"]}, "prompt"),
    ],
)
async def test_answers_that_cannot_be_scored(server: Server, change: dict[str, Any], param: str) -> None:
    answer = await server.post({"model": "bayes", "prompt": "Why?", "completion": "ab", **change}, SCORE)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param and answer.json()["error"]["hint"]
    assert not server.seen


@pytest.mark.parametrize("body", [b"", b"[]", b"no json", b"[" * 10**5])
async def test_bodies_that_are_none(server: Server, body: bytes) -> None:
    assert (await server.post(body, SCORE)).status_code == 400


def above(value: float, **rule: Any) -> dict[str, Any]:
    return {"abstain_above": {"score": "mi_mean", "value": value, **rule}}


async def test_answers_that_are_flagged(server: Server) -> None:
    for value, abstained in ((0.2, True), (0.4, False)):
        (choice,) = (await server.ask(above(value))).json()["choices"]
        assert choice["uncertainty"]["abstained"] is abstained and choice["message"]["content"] == "said"
    text = (await server.ask(above(0.2), stream=True)).text
    assert '"abstained": true' in text


@pytest.mark.parametrize("body", [{"messages": []}, {"prompt": "Why?"}])
async def test_answers_that_are_refused(server: Server, body: dict[str, Any]) -> None:
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    sent = {"model": "bayes", "n": 2, "logprobs": 1, "uncertainty": above(0.2, action="refuse"), **body}
    sure, unsure = (await server.post(sent, path)).json()["choices"]
    assert sure["uncertainty"]["action"] is None and unsure["uncertainty"]["action"] == "refuse"
    if "prompt" in body:
        assert sure["text"] == "said" and unsure["text"] == ""
    else:
        assert sure["message"]["content"] == "said" and "refusal" not in sure["message"]
        assert unsure["message"]["content"] is None and "mi_mean is above 0.2" in unsure["message"]["refusal"]
    assert sure["logprobs"] and unsure["logprobs"] is None and "said" not in json.dumps(unsure)


@pytest.mark.parametrize("to", ["plain", BASE, f"{BASE}:plain"])
async def test_answers_that_are_left_to_another(server: Server, to: str) -> None:
    asked = above(0.2, action="route", route_to=to)
    answer = (await server.ask(asked, temperature=0.5)).json()
    assert answer["model"] == to and answer["choices"][0]["uncertainty"]["action"] == "route"
    (first, exchange_of_first), (second, exchange_of_second) = server.seen
    assert exchange_of_first is not None and exchange_of_second is None
    assert second == first | {"model": to} and all(told == real for told, real in server.lengths)
    server.score = 0.1
    answer = (await server.ask(asked)).json()
    assert answer["model"] == "bayes" and answer["choices"][0]["uncertainty"]["action"] is None
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("asked", "body", "status", "param"),
    [
        (above(0.2, action="refuse"), {"stream": True}, 400, "stream"),
        (above(0.2, action="route", route_to="plain"), {"stream": True}, 400, "stream"),
        (above(0.2, action="route", route_to="plain"), {"n": 2}, 400, "n"),
        (above(0.2, action="route", route_to="other"), {}, 404, "uncertainty.abstain_above.route_to"),
        (above(0.2), {"model": "plain"}, 400, "uncertainty"),  # which has no such score
    ],
)
async def test_what_cannot_be_done_about_an_answer(
    server: Server, asked: Any, body: Any, status: int, param: str
) -> None:
    answer = await server.ask(asked, **body)
    assert answer.status_code == status and answer.json()["error"]["param"] == param
    assert answer.json()["error"]["hint"] and not server.seen


async def test_what_was_written_elsewhere_can_only_be_flagged(server: Server) -> None:
    sent = {"model": "bayes", "prompt": "Why?", "completion": "ab"}
    for action, status in (("refuse", 400), ("flag", 200)):
        answer = await server.post(sent | {"uncertainty": above(0.2, action=action)}, SCORE)
        assert answer.status_code == status


async def test_who_may_not_use_a_model_cannot_be_routed_to_it(server: Server) -> None:
    caller = SimpleNamespace(allows=lambda name: name == "bayes")

    async def with_caller(scope: Any, receive: Any, send: Any) -> None:
        await server.app({**scope, "state": {"loramux_caller": caller}}, receive, send)

    answers = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(with_caller), base_url="http://test") as client:
        for to in ("plain", "nobody"):
            asked = above(0.2, action="route", route_to=to)
            body = {"model": "bayes", "messages": [], "uncertainty": asked}
            answers.append(await client.post("/v1/chat/completions", json=body))
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].text.replace("plain", "nobody") == answers[1].text and not server.seen


async def test_feedback_finds_what_was_told_by_any_of_its_ids(server: Server) -> None:
    await server.ask({}, n=2)
    for choice in (0, 1):
        assert server.recent.feedback("c", choice, ["bayes"], correct=True, label=None)[0] is server.scored
    server.recent = server.app.state.loramux.recent = Recent()
    await server.ask({}, stream=True)
    assert server.recent.feedback("c", 0, ["bayes"], correct=True, label=None)[0] is server.scored
    server.recent = server.app.state.loramux.recent = Recent()
    await server.ask(above(0.2, action="route", route_to="plain"))  # the scores are not of what answered
    with pytest.raises(AnswerNotFound):
        server.recent.feedback("c", 0, ["bayes"], correct=True, label=None)
