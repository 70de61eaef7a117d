"""`POST /v1/uncertainty/feedback`: by id, once, and only on answers of adapters that the caller may use."""

from __future__ import annotations

from typing import Any

import pytest

from loramux.uncertainty.recent import Recent, Scored

from .guarded import KEY, TEAM, Inner, call, gate, guarded
from .serving import Server, error_of

PATH = "/v1/uncertainty/feedback"


def answer(recent: Recent, name: str = "a", *, labels: tuple[str, ...] = (), id: str = "r-1") -> Scored:
    mode = {"mode": "decide", "prediction": labels[0]} if labels else {"mode": "score"}
    told = {**mode, "noise": None, "samples": 0, "seed": 0, "partial": False}
    one = recent.add(name, "d", told, labels, 0.6)
    assert one is not None
    recent.call(one, [id], 0)
    return one


@pytest.fixture
async def recent(server: Server) -> Recent:
    await server.load("a")
    found: Recent = server.app.state.loramux.recent
    return found


async def test_it_is_counted_once(server: Server, recent: Recent) -> None:
    one = answer(recent)
    for counted in (True, False):
        told = (await server.post(PATH, id="r-1", correct=True)).json()
        assert told == {"object": "feedback", "id": "r-1", "model": "a", "correct": True, "counted": counted}
    assert one.right is True
    error_of(await server.post(PATH, id="r-1", correct=False), 409, "feedback_conflict")


async def test_the_right_label(server: Server, recent: Recent) -> None:
    answer(recent, labels=("spam", "ham"))
    assert error_of(await server.post(PATH, id="r-1", label="eggs"), 400, "invalid_request")["param"] == "label"
    assert (await server.post(PATH, id="r-1", label="ham")).json()["correct"] is False


async def test_of_the_base_model(server: Server, recent: Recent) -> None:
    answer(recent, server.app.state.loramux.base)
    assert (await server.post(PATH, id="r-1", correct=False)).status_code == 200


async def test_what_is_not_known(server: Server, recent: Recent) -> None:
    answer(recent)
    for body in ({"id": "r-2"}, {"id": "r-1", "choice": 1}, {"id": ""}):
        error_of(await server.post(PATH, correct=True, **body), 404, "answer_not_found")
    body = b'{"id": "\\ud800", "correct": true}'
    found = await server.client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert found.status_code in (404, 422) and found.json()["error"]["hint"]
    await server.world.registry.delete("a")
    error_of(await server.post(PATH, id="r-1", correct=True), 404, "answer_not_found")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"id": "r-1"},
        {"id": "r-1", "correct": True, "label": "x"},
        {"id": "r-1", "correct": 1},
        {"id": "r-1", "correct": "true"},
        {"id": "r-1", "label": 3},
        {"id": "r-1", "label": "x" * 300},
        {"id": "r" * 300, "correct": True},
        {"id": ["r-1"], "correct": True},
        {"id": "r-1", "correct": True, "choice": -1},
        {"id": "r-1", "correct": True, "choice": True},
        {"id": "r-1", "correct": True, "choice": 10**30},
        {"id": "r-1", "correct": True, "model": "a"},
    ],
)
async def test_what_is_no_feedback(server: Server, recent: Recent, body: dict[str, Any]) -> None:
    one = answer(recent)
    found = await server.post(PATH, **body)
    assert found.status_code in (400, 422) and found.json()["error"]["hint"] and one.right is None


async def test_another_tenants_answers_do_not_exist(server: Server, recent: Recent) -> None:
    """With the whole of the middleware before it; worded as for an answer that nobody has."""
    await server.load("sql")
    for name in ("a", "sql"):
        answer(recent, name, id=f"r-{name}")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await server.app({**scope, "app": server.app}, receive, send)

    async def give(id: str, key: str) -> Any:
        headers = {"Content-Type": "application/json"}
        body = f'{{"id": "{id}", "correct": true}}'.encode()
        return await call(guarded(app, gate()), "POST", PATH, key=key, headers=headers, body=body)

    assert (await give("r-sql", TEAM)).status == 200
    theirs, nobodys = await give("r-a", TEAM), await give("r-b", TEAM)
    assert theirs.status == 404 and theirs.body.replace(b"r-a", b"r-b") == nobodys.body
    assert (await give("r-a", KEY)).status == 200
    inner = Inner()
    assert (await call(guarded(inner, gate()), "POST", PATH)).status == 401 and not inner.scopes
    assert (await call(guarded(inner, gate()), "GET", PATH, key=TEAM)).status == 403 and not inner.scopes
