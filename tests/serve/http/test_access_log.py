"""One line per request, one per change; what is in them, and what never is."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramux.http import access_log, logs

from .guarded import ADMIN, BASE, KEY, TEAM, Inner, call, chat, gate, guarded


class Lines:
    """What both logs wrote to their stream."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    def read(self) -> list[dict[str, Any]]:
        text = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def lines() -> Iterator[Lines]:
    lines, loggers = Lines(), (access_log.access, access_log.audit)
    logs.log_to(lines.stream)
    yield lines
    for logger in loggers:
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


async def test_a_line_says_who_asked_for_what_and_got_what(lines: Lines) -> None:
    answer = await call(
        guarded(Inner(), gate()),
        "POST",
        "/v1/chat/completions",
        key=TEAM,
        headers={"X-Request-Id": "r-1"},
        body=chat("sql@3f"),
        query_string=b"token=in-the-query",
    )
    (line,) = lines.read()
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line.pop("seconds") >= 0
    assert line == {
        "request_id": "r-1",
        "caller": "team-a",
        "client": "192.0.2.7",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "bytes": len(answer.body),
        "model": "sql@3f",
        "error": None,
    }


@pytest.mark.parametrize(
    ("key", "path", "body", "status", "caller", "error"),
    [
        (None, "/v1/completions", chat(), 401, None, "invalid_api_key"),
        ("wrong", "/v1/completions", chat(), 401, None, "invalid_api_key"),
        (TEAM, "/v1/completions", chat("other"), 404, "team-a", "model_not_found"),
        (TEAM, "/tokenize", chat(), 403, "team-a", "route_not_allowed"),
        (KEY, "/v1/completions", b"x" * 2000, 413, "api-key", "request_too_large"),
    ],
)
async def test_refusals_are_logged(
    lines: Lines, key: str | None, path: str, body: bytes, status: int, caller: str | None, error: str
) -> None:
    answer = await call(guarded(Inner(), gate(max_body=1000)), "POST", path, key=key, body=body)
    (line,) = lines.read()
    assert (answer.status, line["status"], line["caller"], line["error"]) == (status, status, caller, error)
    assert line["bytes"] == len(answer.body)


async def test_no_prompt_no_answer_and_no_key_is_logged(lines: Lines) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a secret answer"})

    for key in (KEY, ADMIN, TEAM, "sk-wrong"):
        for header in ({"Authorization": f"Bearer {key}"}, {"X-Api-Key": key}):
            await call(guarded(app, gate()), "POST", "/v1/completions", headers=header, body=chat())
            await call(guarded(app, gate()), "POST", "/v1/load_lora_adapter", headers=header, body=chat())
    text = lines.stream.getvalue()
    assert text and "secret" not in text and "sk-" not in text


hostile = st.text(st.characters(exclude_categories=()), max_size=50)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(hostile, hostile, hostile, st.sampled_from(["GET", "POST", "PUT\n", "\x1b[2J"]))
async def test_whatever_a_client_sends_a_line_stays_a_line(
    lines: Lines, path: str, model: str, name: str, method: str
) -> None:
    body = json.dumps({"model": model, "lora_name": name}).encode()
    for target in ("/" + path, "/v1/adapters/" + path, "/v1/load_lora_adapter"):
        await call(guarded(Inner(), gate()), method, target, key=ADMIN, body=body, client=None)
    text = lines.stream.getvalue()
    assert text.isascii() and text.replace("\n", "").isprintable()
    for line in lines.read():
        assert all(len(value) <= 256 for value in line.values() if isinstance(value, str))


async def test_a_stream_is_one_line_when_it_ends(lines: Lines) -> None:
    seen: list[int] = []

    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"12345", "more_body": True})
            seen.append(len(lines.stream.getvalue()))
        await send({"type": "http.response.body", "body": b""})

    await call(guarded(streaming, gate()), path="/health")
    assert seen == [0, 0, 0]
    assert [line["bytes"] for line in lines.read()] == [15]


async def test_a_client_that_left_is_a_499(lines: Lines) -> None:
    messages = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"12345", "more_body": True})
        await receive()

    await call(guarded(streaming, gate()), "POST", "/v1/completions", key=KEY, receive=receive)
    assert [line["status"] for line in lines.read()] == [499]


async def test_a_request_that_is_cancelled_is_a_499(lines: Lines) -> None:
    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await call(guarded(endless, gate()), path="/health")
    assert [line["status"] for line in lines.read()] == [499]


async def test_a_client_that_leaves_after_its_answer_got_it(lines: Lines) -> None:
    messages = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        await receive()

    await call(guarded(app, gate()), "POST", "/v1/completions", key=KEY, receive=receive)
    assert [line["status"] for line in lines.read()] == [200]


async def test_a_crash_is_a_500(lines: Lines) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await call(guarded(broken, gate()), path="/health")
    assert [(line["status"], line["error"]) for line in lines.read()] == [(500, "internal_error")]


@pytest.mark.parametrize(
    "body", [b"[" * 10**5, b"\xff", b"[]", b'{"model": 7}', b'{"model": "a"' + b" " * 300_000 + b"}"]
)
async def test_a_model_that_is_not_plain_to_see_is_not_logged(lines: Lines, body: bytes) -> None:
    await call(guarded(Inner(), gate()), "POST", "/v1/completions", key=KEY, body=body)
    assert [line["model"] for line in lines.read()] == [None]


async def test_the_access_log_can_be_off_and_leave_out_paths(lines: Lines) -> None:
    await call(guarded(Inner(), gate(access_log=False)), path="/health")
    await call(guarded(Inner(), gate(unlogged=frozenset({"/health"}))), path="/health")
    assert lines.read() == []
    await call(guarded(Inner(), gate(unlogged=frozenset({"/health"}))), path="/health/ready")
    assert len(lines.read()) == 1


@pytest.mark.parametrize(
    ("key", "method", "path", "body", "expected"),
    [
        (ADMIN, "PUT", "/v1/adapters/a", b"{}", ("admin", "put", "a", 200, "ok")),
        (ADMIN, "DELETE", "/v1/adapters/team/a", b"", ("admin", "delete", "team/a", 200, "ok")),
        (ADMIN, "POST", "/v1/adapters/a/rollback", b"", ("admin", "rollback", "a", 200, "ok")),
        (ADMIN, "POST", "/v1/load_lora_adapter", b'{"lora_name": "b"}', ("admin", "load", "b", 200, "ok")),
        (ADMIN, "POST", "/v1/unload_lora_adapter", b"[]", ("admin", "unload", None, 200, "ok")),
        (KEY, "PUT", "/v1/adapters/a", b"{}", ("api-key", "put", "a", 403, "admin_key_required")),
        (TEAM, "DELETE", "/v1/adapters/a", b"", ("team-a", "delete", "a", 403, "admin_key_required")),
        (None, "POST", "/v1/adapters/a/pin", b"", (None, "pin", "a", 401, "invalid_api_key")),
    ],
)
async def test_changes_are_audited_even_without_an_access_log(
    lines: Lines, key: str | None, method: str, path: str, body: bytes, expected: tuple[Any, ...]
) -> None:
    await call(guarded(Inner(), gate(access_log=False)), method, path, key=key, body=body)
    (line,) = lines.read()
    caller, action, adapter, status, outcome = expected
    assert (line["action"], line["adapter"], line["status"], line["outcome"]) == (action, adapter, status, outcome)
    assert line["caller"] == caller
    assert set(line) == {"time", "request_id", "caller", "client", "action", "adapter", "status", "outcome"}


async def test_reading_is_not_audited(lines: Lines) -> None:
    for path in ("/v1/adapters", "/v1/adapters/a", f"/v1/models/{BASE}"):
        await call(guarded(Inner(), gate(access_log=False)), path=path, key=KEY)
    assert lines.read() == []


def test_a_logger_that_was_configured_keeps_its_handlers() -> None:
    handler = logging.NullHandler()
    access_log.access.addHandler(handler)
    access_log.access.setLevel(logging.ERROR)
    try:
        logs.log_to(io.StringIO())
        assert access_log.access.handlers == [handler]
        assert access_log.access.level == logging.ERROR
    finally:
        for logger in (access_log.access, access_log.audit):
            logger.handlers.clear()
            logger.setLevel(logging.NOTSET)
            logger.propagate = True
