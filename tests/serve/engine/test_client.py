"""The API process's side of a load: it ends in one of two ways, and leaves nothing in the worker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loramux.engine.client import EngineDataPlane
from loramux.errors import AdapterRefused, PoolExhausted

from ..fakes import make_artefact, until


class ScriptedEngine:
    """A worker that answers `advance` from a list and then hangs, or at once in the method `hangs_in`."""

    def __init__(self, *answers: Any, hangs_in: str = "") -> None:
        self.answers = list(answers)
        self.hangs_in = hangs_in
        self.calls: list[str] = []

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append(method.removeprefix("loramux_"))
        await asyncio.sleep(0)
        if self.calls[-1] == self.hangs_in:
            await asyncio.Event().wait()
        if method != "loramux_advance":
            return [True]
        if not self.answers:
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [answer]


READING, COPYING = {"state": "reading"}, {"state": "copying"}


async def test_a_load_is_carried_to_its_end() -> None:
    engine = ScriptedEngine(READING, COPYING, COPYING, {"state": "resident", "bytes": 77})
    assert await EngineDataPlane(engine).load(1, make_artefact("a")) == 77
    assert engine.calls == ["begin"] + ["advance"] * 4


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (
            {"state": "failed", "error": {"code": "adapter_memory_full", "needed": 3 * 2**20, "free": 2**20}},
            PoolExhausted,
            "adapter_memory_full",
        ),
        (
            {"state": "failed", "error": {"code": "adapter_unservable", "message": "No."}},
            AdapterRefused,
            "adapter_unservable",
        ),
        (RuntimeError("engine"), RuntimeError, None),
    ],
)
async def test_a_failed_load_is_cleaned_up(answer: Any, kind: type[Exception], code: str | None) -> None:
    engine = ScriptedEngine(READING, answer)
    with pytest.raises(kind) as caught:
        await EngineDataPlane(engine).load(1, make_artefact("a"))
    assert getattr(caught.value, "code", None) == code
    assert engine.calls[-1] == "remove"
    if kind is PoolExhausted:
        assert "needs 3.0 MiB, 1.0 MiB are free" in str(caught.value)


@pytest.mark.parametrize("method", ["begin", "advance"])
async def test_a_cancelled_load_is_cleaned_up(method: str) -> None:
    """While it is asked for as well: the worker may have heard it, and other loads would move it on."""
    engine = ScriptedEngine(hangs_in=method)
    task = asyncio.create_task(EngineDataPlane(engine).load(1, make_artefact("a")))
    await until(lambda: engine.calls[-1:] == [method])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.calls[-1] == "remove"
