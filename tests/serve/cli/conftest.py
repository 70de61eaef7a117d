"""A fake server for the commands, and an environment that names no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..fake_server import FakeServer, Stage, card, failed, served


@pytest.fixture(autouse=True)
def no_server_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORAMUX_URL", "LORAMUX_API_KEY", "LORAMUX_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def stage() -> Iterator[tuple[Stage, str]]:
    stage = Stage()
    with served(stage) as url:
        yield stage, url


@pytest.fixture
def server(stage: tuple[Stage, str], monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """Its address is in LORAMUX_URL."""
    fake = FakeServer({"sql": card("sql", leases=2, pinned=True), "bad": failed("bad", "NaN at layer 3.")})
    stage[0].fake, fake.url = fake, stage[1]
    monkeypatch.setenv("LORAMUX_URL", fake.url)
    return fake
