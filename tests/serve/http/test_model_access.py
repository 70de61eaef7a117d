"""A key with an allow-list: its adapters, the base, and nothing else exists."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.http.model_access import adapter_of
from loramux.registry.catalogue import Catalogue

from .guarded import BASE, KEY, TEAM, Inner, call, chat, gate, guarded


async def ask(body: bytes, path: str = "/v1/chat/completions", key: str = TEAM, **more: Any) -> tuple[Any, Inner]:
    inner = Inner()
    return await call(guarded(inner, gate()), "POST", path, key=key, body=body, **more), inner


ALLOWED = ["sql", "sql@3f2a", f"{BASE}:sql", f"{BASE}:sql@3f2a", "legal-uk", "legal-uk/v2@00", BASE, None, ""]
DENIED = ["other", "sql2", "SQL", " sql", "sql ", "x@sql", "@sql", f"{BASE}:other", f"other:{BASE}", "other:sql",
          f"{BASE}:", f"{BASE}2", "legal", "*", "\ud800", "a" * 10**5]  # fmt: skip


@pytest.mark.parametrize("model", ALLOWED)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_its_own_models_pass_with_their_body(model: Any, path: str) -> None:
    answer, inner = await ask(chat(model), path)
    assert (answer.status, inner.bodies) == (200, [chat(model)])


@pytest.mark.parametrize("model", DENIED)
async def test_other_models_do_not_exist(model: str) -> None:
    answer, inner = await ask(chat(model))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert inner.scopes == []
    assert len(answer.body) < 1000


async def test_a_body_without_a_model_is_for_the_base() -> None:
    answer, inner = await ask(b'{"messages": []}')
    assert (answer.status, len(inner.bodies)) == (200, 1)


async def test_a_body_in_pieces_is_checked_and_passed_whole() -> None:
    pieces = [bytes([byte]) for byte in chat("sql")]
    answer, inner = await ask(pieces)  # type: ignore[arg-type]
    assert (answer.status, inner.bodies) == (200, [chat("sql")])
    answer, inner = await ask([bytes([byte]) for byte in chat("other")])  # type: ignore[arg-type]
    assert (answer.status, inner.scopes) == (404, [])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"sql"',
        b'{"model": "sql", "model": "other"}',
        b'{"model": "other", "model": "sql"}',
        b'{"model": "sql", "\\u006dodel": "other"}',
        b'{"model": 7}',
        b'{"model": ["sql"]}',
        b'{"model": {"model": "sql"}}',
        b'{"model": true}',
        b'{"model": "sql"} {"model": "other"}',
        b'{"model": "\xff\xfe"}',
        b"model=sql&prompt=x",
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b'{"model": "sql", "n": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: body[:30].decode("latin-1"),
)
async def test_a_body_whose_model_is_not_certain_is_refused(body: bytes) -> None:
    answer, inner = await ask(body)
    assert (answer.status, answer.error["code"], inner.scopes) == (400, "invalid_request", [])


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_the_content_type_does_not_matter(content_type: str) -> None:
    answer, inner = await ask(chat("other"), headers={"Content-Type": content_type})
    assert (answer.status, inner.scopes) == (404, [])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
async def test_what_the_route_would_decode_is_decoded(encoding: str) -> None:
    """Starlette parses a body with `json.loads`, which takes these encodings."""
    for model, status in (("sql", 200), ("other", 404)):
        answer, _ = await ask(chat(model).decode().encode(encoding))
        assert answer.status == status


async def test_nested_models_are_not_the_model() -> None:
    answer, _ = await ask(chat("sql", metadata={"model": "other"}))
    assert answer.status == 200
    answer, _ = await ask(json.dumps({"metadata": {"model": "sql"}, "model": "other"}).encode())
    assert answer.status == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200),
        ("GET", "/v1/adapters", 200),
        ("GET", f"/v1/models/{BASE}", 200),
        ("GET", "/v1/models/sql", 200),
        ("GET", "/v1/adapters/legal-uk/v2", 200),
        ("GET", "/version", 200),
        ("GET", "/", 200),
        ("GET", "/health/ready", 200),
        ("GET", "/v1/models/other", 404),
        ("HEAD", "/v1/models/other", 404),
        ("GET", "/v1/adapters/other", 404),
        ("GET", "/v1/adapters/sql/../other", 404),
        ("GET", "/v1/adapters/sql\n", 403),
        ("GET", "/v1/models/", 403),
        ("GET", "//v1/models", 403),
        ("GET", "/v1/models//", 404),
        ("GET", "/V1/models", 403),
        ("OPTIONS", "/v1/models", 403),
        ("POST", "/v1/models", 403),
        ("GET", "/v1/responses/resp_1", 403),
        ("GET", "/server_info", 403),
        ("GET", "/load", 403),
        ("GET", "/ping", 403),
        ("GET", "/static/x", 403),
        ("GET", "/metrics/x", 403),
        *(
            ("POST", path, 403)
            for path in (
                "/v1/chat/completions/",
                "/v1/chat/completions/batch",
                "/v1/chat/completions/render",
                "//v1/chat/completions",
                "/v1/responses",
                "/v1/messages",
                "/v1/embeddings",
                "/v1/audio/transcriptions",
                "/v1/a/route/of/tomorrow",
                "/tokenize",
                "/detokenize",
                "/invocations",
                "/pooling",
                "/score",
                "/inference/v1/generate",
                "/cohere/v2/chat",
                "/sleep",
                "/collective_rpc",
                "/reset_prefix_cache",
                "/v1/load_lora_adapter",
                "/adapters",
            )
        ),
    ],
)
async def test_all_that_such_a_key_reaches(method: str, path: str, status: int) -> None:
    inner = Inner()
    answer = await call(guarded(inner, gate()), method, path, key=TEAM, body=chat("sql"))
    assert answer.status == status
    assert len(inner.scopes) == (status == 200)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Amzn-SageMaker-Adapter-Identifier": "other"},
        {"X-HTTP-Method-Override": "PUT"},
        {"X-Original-URL": "/v1/models"},
        {"X-Rewrite-URL": "/health"},
    ],
)
async def test_no_header_names_another_model_or_route(headers: dict[str, str]) -> None:
    app = guarded(Inner(), gate())
    assert (
        await call(app, "POST", "/v1/chat/completions", key=TEAM, headers=headers, body=chat("other"))
    ).status == 404
    assert (await call(app, "POST", "/invocations", key=TEAM, headers=headers, body=chat("sql"))).status == 403
    assert (await call(app, "POST", "/v1/adapters/a/pin", key=TEAM, headers=headers)).status == 403


class Registry:
    """Knows no model, and says which names it knows."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b'{"error": {"message": "no such model, did you mean secret-tenant?", "code": "model_not_found"}}'
        await send({"type": "http.response.start", "status": 404, "headers": [(b"x-clue", b"secret-tenant")]})
        await send({"type": "http.response.body", "body": body[:20], "more_body": True})
        await send({"type": "http.response.body", "body": body[20:]})


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/chat/completions"), ("GET", "/v1/models/{}")])
async def test_what_is_not_there_and_what_is_not_allowed_look_the_same(method: str, path: str) -> None:
    app = guarded(Registry(), gate())
    missing = await call(app, method, path.format("legal-xx"), key=TEAM, body=chat("legal-xx"))
    denied = await call(app, method, path.format("secret-x"), key=TEAM, body=chat("secret-x"))
    assert missing.status == denied.status == 404
    assert b"tenant" not in missing.body
    assert missing.body.replace(b"legal-xx", b"secret-x") == denied.body
    names = [[key for key, _ in answer.headers] for answer in (missing, denied)]
    assert names[0] == names[1]


async def test_without_an_allow_list_nothing_is_read_or_reworded() -> None:
    answer = await call(guarded(Registry(), gate()), "POST", "/v1/chat/completions", key=KEY, body=b"not json")
    assert b"did you mean" in answer.body


async def test_a_client_that_leaves_while_its_body_is_read_reaches_nothing() -> None:
    inner = Inner()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    answer = await call(guarded(inner, gate()), "POST", "/v1/completions", key=TEAM, receive=receive)
    assert (answer.status, inner.scopes) == (None, [])


async def test_after_the_body_the_app_still_sees_the_client_leave() -> None:
    seen: list[str] = []
    coming = [{"type": "http.request", "body": chat("sql")}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return coming.pop(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"] for _ in range(2)])

    await call(guarded(app, gate()), "POST", "/v1/completions", key=TEAM, receive=receive)
    assert seen == ["http.request", "http.disconnect"]


names = st.text("ab:@/", min_size=1, max_size=6)


@settings(max_examples=300)
@given(names, st.lists(names, min_size=1, max_size=2, unique=True))
def test_the_registry_and_the_allow_list_read_a_spelling_alike(spelling: str, bases: list[str]) -> None:
    class Everything(Catalogue):
        def __contains__(self, name: object) -> bool:
            return True

        def __missing__(self, name: str) -> Any:
            return name

    if spelling not in bases:  # vLLM answers for the base before it asks the registry
        assert Everything(bases).adapter(spelling) == adapter_of(spelling, tuple(bases))  # type: ignore[comparison-overlap]
    assert adapter_of(bases[0], tuple(bases)) is None
