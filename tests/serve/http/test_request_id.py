"""Every answer carries the request's id, and vLLM sees the same one."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .guarded import KEY, Inner, call, gate, guarded

MADE = re.compile(r"[0-9a-f]{32}")


async def ids(*given: str, **more: Any) -> tuple[list[str], list[str]]:
    """X-Request-Id of the answer, and of the request as the app saw it."""
    inner = Inner()
    pairs = [(b"X-Request-ID", value.encode("latin-1")) for value in given]
    answer = await call(guarded(inner, gate()), headers=pairs, **{"key": KEY, **more})
    seen = [v.decode() for scope in inner.scopes for k, v in scope["headers"] if k.lower() == b"x-request-id"]
    return answer.header("x-request-id"), seen


@given(st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True))
async def test_a_usable_id_is_kept(request_id: str) -> None:
    assert await ids(request_id) == ([request_id], [request_id])


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("",),
        ("a b",),
        ("a\r\nSet-Cookie: x",),
        ("ü",),
        ("a" * 129,),
        ("<script>",),
        ("a\n",),
        ("one", "two"),
        ("a", "a"),
    ],
)
async def test_any_other_is_replaced(given: tuple[str, ...]) -> None:
    (answered,), seen = await ids(*given)
    assert MADE.fullmatch(answered)
    assert seen == [answered]


async def test_made_ids_differ() -> None:
    assert len({(await ids())[0][0] for _ in range(20)}) == 20


@pytest.mark.parametrize("more", [{"key": None}, {"path": "/sleep", "method": "POST"}, {"path": "/health"}])
async def test_refusals_carry_it_too(more: dict[str, Any]) -> None:
    assert (await ids("mine", **more))[0] == ["mine"]


async def test_a_crash_carries_it_too() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(ZeroDivisionError):
        await guarded(broken, gate())(
            {"type": "http", "method": "GET", "path": "/health", "headers": [(b"x-request-id", b"mine")]}, None, send
        )
    assert (sent[0]["status"], dict(sent[0]["headers"])[b"x-request-id"]) == (500, b"mine")


async def test_what_the_app_says_itself_is_not_said_twice() -> None:
    """vLLM's own --enable-request-id-headers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Request-Id", b"theirs")]})
        await send({"type": "http.response.body", "body": b""})

    answer = await call(guarded(app, gate()), path="/health", headers={"X-Request-Id": "mine"})
    assert answer.header("x-request-id") == ["mine"]
