"""Bodies have a size and a time, whoever sends them and however."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.errors import RequestTooLarge
from loramux.http import body_limit

from .guarded import KEY, TEAM, Inner, call, chat, gate, guarded

LIMIT = 1000


async def post(inner: Any, **more: Any) -> Any:
    return await call(guarded(inner, gate(max_body=LIMIT)), "POST", "/v1/completions", **{"key": KEY, **more})


@pytest.mark.parametrize("length", ["1001", "9" * 30])
async def test_a_declared_length_over_the_limit_is_refused_unread(length: str) -> None:
    async def receive() -> Any:
        raise AssertionError("the body was read")

    inner = Inner()
    answer = await post(inner, headers={"Content-Length": length}, receive=receive)
    assert (answer.status, answer.error["code"], inner.scopes) == (413, "request_too_large", [])
    assert answer.header("connection") == ["close"]
    assert "--max-body" in answer.error["hint"]


async def test_without_a_key_a_large_body_is_first_of_all_without_a_key() -> None:
    assert (await post(Inner(), key=None, headers={"Content-Length": "1001"})).status == 401


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "5"}, {"Content-Length": "-1"}, {"Content-Length": "x"}])
async def test_what_arrives_is_counted_whatever_was_declared(headers: dict[str, str]) -> None:
    inner = Inner()
    answer = await post(inner, headers=headers, body=[b"x" * 400] * 3)
    assert (answer.status, inner.bodies) == (413, [])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 600), max_size=5))
async def test_exactly_the_bodies_within_the_limit_pass(sizes: list[int]) -> None:
    inner = Inner()
    answer = await post(inner, body=[b"x" * size for size in sizes] or b"")
    fits = sum(sizes) <= LIMIT
    assert answer.status == (200 if fits else 413)
    assert inner.bodies == ([b"x" * sum(sizes)] if fits else [])


async def test_a_body_without_end_is_read_no_further_than_the_limit() -> None:
    pieces = 0

    async def receive() -> Any:
        nonlocal pieces
        pieces += 1
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    assert (await post(Inner(), receive=receive)).status == 413
    assert pieces == 11


async def test_the_limit_holds_for_restricted_keys_too() -> None:
    assert (await post(Inner(), key=TEAM, body=[chat("sql"), b" " * LIMIT])).status == 413


async def test_a_framework_that_makes_its_own_of_the_error_is_overruled() -> None:
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any], request: Request) -> None:
        raise AssertionError("unreachable")

    answer = await post(app, headers={"Content-Type": "application/json"}, body=[b'{"a": "', b"x" * LIMIT])
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(body_limit, "PATIENCE_S", 0.01)
    monkeypatch.setattr(body_limit, "MIN_BYTES_PER_S", 1e6)
    return


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("key", [KEY, TEAM])
async def test_a_body_that_stalls_is_refused(key: str) -> None:
    coming = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> Any:
        return coming.pop() if coming else await asyncio.Event().wait()

    inner = Inner()
    answer = await post(inner, key=key, receive=receive)
    assert (answer.status, answer.error["code"], inner.bodies) == (408, "request_timeout", [])
    assert answer.header("connection") == ["close"]


@pytest.mark.usefixtures("hurried")
async def test_a_body_that_trickles_is_refused() -> None:
    async def receive() -> Any:
        await asyncio.sleep(0.004)
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert (await post(Inner(), receive=receive)).status == 408


async def test_a_slow_line_is_given_time_by_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "PATIENCE_S", 0.05)
    monkeypatch.setattr(body_limit, "MIN_BYTES_PER_S", 100)  # each piece of 10 bytes earns 0.1 s
    pieces = 0

    async def receive() -> Any:
        nonlocal pieces
        pieces += 1
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"x" * 10, "more_body": pieces < 6}

    assert (await post(Inner(), receive=receive)).status == 200


@pytest.mark.usefixtures("hurried")
async def test_after_the_body_time_does_not_run() -> None:
    left = asyncio.Event()
    coming = [{"type": "http.request", "body": b"{}"}]

    async def receive() -> Any:
        if coming:
            return coming.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def generating(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        waiting = asyncio.create_task(receive())
        await asyncio.sleep(0.03)
        assert not waiting.done()
        left.set()
        assert (await waiting)["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    assert (await post(generating, receive=receive)).status == 200


async def test_errors_of_the_app_stay_its_own() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await post(broken)


async def test_an_answer_that_began_is_not_answered_again() -> None:
    async def eager(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await receive()

    with pytest.raises(RequestTooLarge):
        await call(guarded(eager, gate(max_body=LIMIT)), "POST", "/tokenize", key=KEY, body=[b"x" * 600] * 3)
