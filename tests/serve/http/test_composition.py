"""`"adapters": […]`: how a request names a sum, what it may not say, and who may use which part."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from loramux.http.composition import answered_by
from loramux.http.parts import MAX_PARTS
from loramux.metrics.routing import wanted
from loramux.registry.compositions import COMPOSED
from loramux_adapters import AdapterCorrupt, AdapterUnsupportedFeature

from ..fakes import World
from .guarded import BASE, KEY, TEAM, Answer, call, chat, gate, guarded

A, B = {"name": "sql", "weight": 0.7}, {"name": "legal-uk", "weight": 0.3}


class Engine:
    """Stands in for vLLM: looks the model up, leases it, answers with what it saw."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.seen: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        content = (await receive())["body"]
        body = json.loads(content)
        lengths = [int(value) for name, value in scope["headers"] if name == b"content-length"]
        assert lengths in ([], [len(content)])
        self.seen.append(body)
        composed = answered_by.get()
        if composed is not None:
            assert body["model"] == composed.version.tag
            self.world.registry.release(await self.world.registry.lease(body["model"], exact=True))
        if (report := wanted.get()) is not None:
            report.value = {"experts": [{"expert": 0, "weight": 0.75}, {"expert": 1, "weight": 0.25}]}
        answer = json.dumps({"model": composed.model if composed else body.get("model")}).encode()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


class Server:
    def __init__(self, world: World) -> None:
        self.world = world
        self.engine = Engine(world)
        self._app = guarded(self.engine, gate(bases=(BASE, "alias")), services=SimpleNamespace(registry=world.registry))

    async def post(self, body: Any, key: str = KEY, path: str = "/v1/chat/completions") -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(content))}
        return await call(self._app, "POST", path, key=key, body=content, headers=headers)

    async def refused(self, body: Any, status: int = 400, **options: Any) -> dict[str, Any]:
        answer = await self.post(body, **options)
        assert (answer.status, self.engine.seen) == (status, [])
        assert answer.error["hint"]
        return answer.error


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    world = World()
    for name in ("sql", "legal-uk", "secret"):
        await world.load(name)
    yield Server(world)
    assert answered_by.get() is None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("key", [KEY, TEAM])
@pytest.mark.parametrize("model", [BASE, "alias", None])
async def test_the_sum_answers_by_the_name_that_was_written(server: Server, path: str, key: str, model: Any) -> None:
    more = {} if model is None else {"model": model}
    answer = await server.post({"messages": [], "adapters": [A, B], "n": 1, **more}, key=key, path=path)
    assert json.loads(answer.body) == {"model": model or BASE}
    (seen,) = server.engine.seen
    assert seen.pop("model").startswith(f"{COMPOSED}@") and seen == {"messages": [], "n": 1}
    assert server.world.observer.leased[COMPOSED] == 0  # it had one, and gave it back


async def test_a_part_without_a_weight_has_one(server: Server) -> None:
    await server.post({"adapters": [{"name": "sql"}]})
    await server.post({"adapters": [{"name": "sql", "weight": 1.0}]})
    assert len(server.world.compose.made) == 1


ROUTER = {"type": "arrow", "top_k": 1, "temperature": 0.5}


@pytest.mark.parametrize("key", [KEY, TEAM])
async def test_a_router_answers_by_the_name_that_was_written(server: Server, key: str) -> None:
    sampling = {"temperature": 0.2, "top_k": 40}
    for parts in (["sql", "legal-uk"], [{"name": "legal-uk"}, "sql"]):
        answer = await server.post({"adapters": parts, "router": ROUTER, **sampling}, key=key)
        assert json.loads(answer.body) == {"model": BASE}
    for seen in server.engine.seen:
        assert seen.pop("model").startswith(f"{COMPOSED}@") and seen == sampling
    (made,) = server.world.compose.made
    assert made.startswith("Router(top_k=1, temperature=0.5)(")


async def test_the_same_parts_are_one_version_for_each_router(server: Server) -> None:
    wishes: list[dict[str, Any]] = [{}, {"router": "arrow"}, {"router": ROUTER}, {"router": {**ROUTER, "top_k": 2}}]
    for wish in (*wishes, {"router": None}, {"router": {"type": "arrow", "top_k": 2}}):
        assert (await server.post({"adapters": ["sql", "legal-uk"], **wish})).status == 200
    assert len(server.world.compose.made) == len(wishes) == len({seen["model"] for seen in server.engine.seen})


@pytest.mark.parametrize("hidden", ['"\\u0072outer"', '"route\\u0072"', '"router"'])
async def test_a_router_without_parts_is_refused(server: Server, hidden: str) -> None:
    body = f'{{"model": "{BASE}", {hidden}: "arrow"}}'.encode()
    assert (await server.refused(body))["param"] == "adapters"


async def test_what_a_router_cannot_route_tells_which(server: Server) -> None:
    server.world.compose.error = AdapterUnsupportedFeature(
        "'legal-uk' uses magnitude.", hint="Plain.", field="legal-uk"
    )
    error = await server.refused({"adapters": ["sql", "legal-uk"], "router": "arrow"})
    assert (error["code"], error["param"]) == ("adapter_unsupported_feature", "adapters")
    assert "legal-uk" in error["message"]
    server.world.compose.error = None
    for parts, param in ((["sql", "sql"], "adapters[1].name"), (["sql", BASE], "adapters[1].name")):
        error = await server.refused({"adapters": parts, "router": "arrow"})
        assert (error["param"], "weight" in error["hint"]) == (param, False)


async def test_experts_are_told_by_their_place_in_the_request(server: Server) -> None:
    """Whatever order the mixture has them in."""
    first, second = server.world.current("sql"), server.world.current("legal-uk")
    assert first.artefact is not None and second.artefact is not None
    smaller = 0 if first.artefact.digest < second.artefact.digest else 1
    for parts, expert in ((["sql", "legal-uk"], smaller), (["legal-uk", "sql"], 1 - smaller)):
        answer = await server.post({"adapters": parts, "router": "arrow", "routing": True})
        told = json.loads(answer.body)["routing"]["experts"]
        assert [one["expert"] for one in told] == [0, 1]
        assert [one["weight"] for one in told] == ([0.75, 0.25] if expert == 0 else [0.25, 0.75])


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"adapters": None},
        {"router": None},
        {"user": '"router"'},
        {"user": '"adapters"'},
        {"metadata": {"adapters": [A]}},
    ],
)
async def test_who_does_not_ask_passes_untouched(server: Server, body: dict[str, Any]) -> None:
    body = {"model": BASE, "messages": [], **body}
    assert (await server.post(body)).status == 200
    assert server.engine.seen == [body] and not server.world.compose.made


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
async def test_no_encoding_hides_the_field(server: Server, encoding: str) -> None:
    body = json.dumps({"model": BASE, "adapters": [A]})
    await server.post(body.encode(encoding))
    await server.post(body.replace('"adapters"', '"\\u0061dapters"').encode())
    assert all(seen["model"].startswith(COMPOSED) for seen in server.engine.seen) and len(server.engine.seen) == 2


@pytest.mark.parametrize(
    ("adapters", "param"),
    [
        ([], "adapters"),
        ({}, "adapters"),
        ("sql", "adapters"),
        (True, "adapters"),
        (0, "adapters"),
        ([{"name": f"a{i}"} for i in range(MAX_PARTS + 1)], "adapters"),
        ([A] * 10**5, "adapters"),
        ([["sql"]], "adapters[0]"),
        (["sql", ""], "adapters[1].name"),
        ([BASE], "adapters[0].name"),
        (["sql", A], "adapters[1].name"),
        ([A, None], "adapters[1]"),
        ([{}], "adapters[0]"),
        ([{"weight": 1}], "adapters[0]"),
        ([{**A, "scale": 2}], "adapters[0]"),
        ([{**A, "task": "surgery"}], "adapters[0].task"),
        ([{**A, "task": True}], "adapters[0].task"),
        ([{**A, "task": 1.0}], "adapters[0].task"),
        ([{**A, "task": 10**4000}], "adapters[0].task"),
        ([{**A, "task": 0}], "adapters[0].task"),  # it has none
        ([{"name": 7}], "adapters[0].name"),
        ([{"name": ["sql"]}], "adapters[0].name"),
        ([{"name": ""}], "adapters[0].name"),
        ([{"name": "a" * 10**5}], "adapters[0].name"),
        ([{"name": BASE}], "adapters[0].name"),
        ([A, A], "adapters[1].name"),
        *(
            ([A, {**B, "weight": weight}], "adapters[1].weight")
            for weight in (0, -0.0, 1e-300, 101, -101, 10**400, "0.5", "NaN", None, True, [1], {}, float("nan"))
        ),
        ([{**A, "weight": float("inf")}], "adapters[0].weight"),
        ([{**A, "weight": float("-inf")}], "adapters[0].weight"),
    ],
)
@pytest.mark.parametrize("key", [KEY, TEAM])
async def test_what_is_no_list_of_parts_is_refused(server: Server, adapters: Any, param: str, key: str) -> None:
    error = await server.refused({"model": BASE, "adapters": adapters}, key=key)
    assert (error["code"], error["param"], error["type"]) == ("invalid_request", param, "invalid_request_error")
    assert len(json.dumps(error)) < 1000


@pytest.mark.parametrize("model", ["sql", "", 7, [BASE], f"{BASE}:sql"])
async def test_the_model_must_be_the_base(server: Server, model: Any) -> None:
    error = await server.refused({"model": model, "adapters": [A]})
    assert (error["param"], error["code"]) == ("model", "invalid_request") and BASE in error["hint"]


async def test_an_unknown_part_has_close_names(server: Server) -> None:
    error = await server.refused({"adapters": [A, {"name": "legal-uc"}]}, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "adapters[1].name")
    assert "'legal-uk'" in error["hint"]


async def test_a_key_reaches_none_but_its_parts(server: Server) -> None:
    """And cannot tell those of others from those that are nowhere."""
    answers = []
    for name in ("secret", "nowher"):
        for place in (0, 1):
            parts: list[dict[str, Any]] = [A]
            parts.insert(place, {"name": name})
            asked: dict[str, Any] = {"model": BASE, "adapters": parts}
            error = await server.refused(asked, 404, key=TEAM)
            assert await server.refused({**asked, "adapters": ["sql", name], "router": "arrow"}, 404, key=TEAM)
            assert (error["code"], error["param"]) == ("model_not_found", "adapters")
            answers.append(json.dumps(error).replace(name, "…"))
    missing_but_allowed = await server.refused({"adapters": [A, {"name": "legal-xx"}]}, 404, key=TEAM)
    answers.append(json.dumps(missing_but_allowed).replace("legal-xx", "…"))
    assert answers[0] == answers[2] and answers[1] == answers[3] == answers[4]
    assert (await server.post({"adapters": [A, {"name": "secret"}]})).status == 200  # the key without a list


@pytest.mark.parametrize("name", [f"{BASE}:secret", "secret@0000", "@sql", " sql", "SQL", "*", "\ud800"])
async def test_no_spelling_gets_around_the_list(server: Server, name: str) -> None:
    await server.refused({"model": BASE, "adapters": [A, {"name": name}]}, 404, key=TEAM)


async def test_what_another_asked_for_cannot_be_asked_for_by_its_tag(server: Server) -> None:
    await server.post({"adapters": [{"name": "secret"}]})
    (tag,) = (seen["model"] for seen in server.engine.seen)
    assert server.world.registry.lookup(tag) is None
    server.engine.seen.clear()
    await server.refused(chat(tag), 404, key=TEAM)
    await server.refused({"adapters": [{"name": tag}]}, 404)


async def test_a_part_that_failed(server: Server) -> None:
    world = server.world
    world.compose.error = AdapterCorrupt("at /var/cache/secret-host-path", hint="")
    error = await server.refused({"adapters": [A]})
    assert error["code"] == "adapter_unreadable" and "secret-host" not in json.dumps(error)


async def test_the_access_log_names_the_parts(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="loramux.access")
    await server.post({"model": BASE, "adapters": [A, B]})
    await server.post({"model": BASE, "adapters": [{"name": "a" * 500}] * 400})
    await server.post({"model": BASE})
    await server.post({"adapters": ["sql", "legal-uk"], "router": "arrow"})
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "loramux.access"]
    assert [line["model"] for line in lines] == [BASE, BASE, BASE, None]
    assert lines[3]["adapters"] == ["sql", "legal-uk"]
    assert lines[0]["adapters"] == ["sql", "legal-uk"]
    assert len(json.dumps(lines[1])) < 4000
    assert "adapters" not in lines[2]
