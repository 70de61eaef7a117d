"""What is on disk survives; what is no state file is refused by name."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from loramux.errors import ConfigError, StateNotWritten
from loramux.registry import Store
from loramux.registry.sources import signature
from loramux.registry.store import Saved

from ..fakes import make_artefact

ROW = Saved("a", "/s", "d" * 64, "/p", "e" * 64, "/n", pinned=True, given=True)


def open_store(path: Path, base: str = "base") -> Store:
    return Store.open(path, base=base, cache=path.parent.parent / "cache")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "deep" / "state.sqlite"


def test_rows_come_back_as_they_were(path: Path) -> None:
    store = open_store(path)
    for row in (ROW, Saved("b"), Saved("b", "/s2"), Saved("c")):
        store.save(row)
    store.delete("c")
    store.delete("nobody")
    store.close()
    assert open_store(path).adapters() == [ROW, Saved("b", "/s2")]


def settled(source: Path, text: str) -> str | None:
    source.write_text(text)
    os.utime(source, (10**9, 10**9 + len(text)))
    return signature(source)


def test_a_source_is_recalled_while_it_and_its_artefact_are_what_they_were(path: Path) -> None:
    source = path.parent.parent / "a.safetensors"
    artefact = make_artefact("one", path.parent.parent / "cache")
    store = open_store(path)
    assert store.recall(source) is None
    store.remember(source, settled(source, "one"), artefact)
    assert store.recall(source) is None  # there is no such artefact
    artefact.path.write_text("")
    assert store.recall(source) == artefact == store.artefact(artefact.digest)
    store.close()
    store = open_store(path)
    assert store.recall(source) == artefact
    settled(source, "other")
    assert store.recall(source) is None
    store.remember(source, None, artefact)  # changed while it was read
    assert store.recall(source) is None


def test_another_base_model_needs_everything_read_again(path: Path) -> None:
    source = path.parent.parent / "a.safetensors"
    artefact = make_artefact("one", path.parent.parent / "cache")
    artefact.path.write_text("")
    store = open_store(path)
    store.save(ROW)
    store.remember(source, settled(source, "one"), artefact)
    store.close()
    store = open_store(path, base="another")
    assert store.adapters() == [Saved("a", "/s", None, None, None, "/n", pinned=True, given=True)]
    assert store.recall(source) is None and store.artefact(artefact.digest) is None


def test_a_damaged_file_is_named_with_what_to_do(path: Path) -> None:
    store = open_store(path)
    for i in range(200):
        store.save(Saved(f"a{i}", "/s" * 50))
    store.close()
    whole = path.read_bytes()
    for content in (b"no database at all" * 100, whole[:8192] + b"\xff" * 4096 + whole[12288:], whole[:5000]):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            open_store(path)
        assert str(path) in caught.value.message and "Move it away" in str(caught.value.hint)


@pytest.mark.parametrize("script", ["CREATE TABLE theirs (x)", "PRAGMA user_version = 99"])
def test_a_file_of_something_else_is_refused_and_left_alone(path: Path, script: str) -> None:
    if "user_version" in script:
        open_store(path).close()
    path.parent.mkdir(exist_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_store(path)
    assert str(path) in caught.value.message and caught.value.hint
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "state.sqlite", tmp_path):
        with pytest.raises(ConfigError, match=str(tmp_path)) as caught:
            open_store(path)
        assert "--state" in str(caught.value.hint)


def test_a_write_that_fails_changes_nothing(path: Path) -> None:
    store = open_store(path)
    store.save(ROW)
    store._connection.execute("PRAGMA query_only = ON")
    for call in (lambda: store.save(Saved("a")), lambda: store.delete("a")):
        with pytest.raises(StateNotWritten):
            call()
    assert store.adapters() == [ROW]


fork = multiprocessing.get_context("fork")


def _hold(path: Path, ready: Any) -> None:
    store = open_store(path)
    ready.set()
    time.sleep(60)
    store.close()


def test_a_second_server_is_refused_until_the_first_has_ended(path: Path) -> None:
    ready = fork.Event()
    other = fork.Process(target=_hold, args=(path, ready))
    other.start()
    try:
        assert ready.wait(10)
        with pytest.raises(ConfigError) as caught:
            open_store(path)
        assert "--state" in str(caught.value.hint) and str(path) in caught.value.message
    finally:
        other.kill()
        other.join()
    open_store(path).close()
