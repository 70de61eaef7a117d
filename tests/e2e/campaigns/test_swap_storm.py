"""One name replaced 500 times under load: every answer is wholly one version's, and no older one's than was current."""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import run_server
from .conftest import MakeAdapter, complete, put

SWAPS = 500
CLIENTS = 4
TOKENS = 12
PROMPTS = ("The lighthouse keeper", "In the final minute of", "Copper is used for")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, make_adapter: MakeAdapter) -> list[Path]:
    folder = tmp_path_factory.mktemp("versions")
    return [make_adapter(folder / f"v{i}", seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, sources: list[Path]) -> Any:
    with run_server(tmp_path_factory.mktemp("storm") / "log", "--adapter-root", str(sources[0].parent)) as server:
        yield server.url


def test_swap_storm(url: str, sources: list[Path]) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        expected: list[dict[str, str]] = []
        for source in sources:
            assert put(client, source.name, source).status_code == 200
            expected.append({prompt: complete(client, source.name, prompt, TOKENS) for prompt in PROMPTS})
        for prompt in PROMPTS:
            assert len({answers[prompt] for answers in expected}) == len(sources), "the versions must differ"

        assert put(client, "hot", sources[0]).status_code == 200
        # (asked, answered, version): the version may be served from `asked` until its successor is answered.
        swaps, done = [(0.0, time.monotonic(), 0)], threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            asking = [pool.submit(_ask, url, n, done) for n in range(CLIENTS)]
            versions = random.Random(0)
            try:
                for _ in range(SWAPS):
                    version = versions.choice([v for v in range(len(sources)) if v != swaps[-1][2]])
                    asked = time.monotonic()
                    answer = put(client, "hot", sources[version])
                    assert answer.status_code == 200, answer.text
                    swaps.append((asked, time.monotonic(), version))
            finally:
                done.set()
            answers = [answer for ask in asking for answer in ask.result()]

    assert len(answers) > SWAPS / 4, "too little load to mean anything"
    for began, ended, prompt, text in answers:
        allowed = _allowed(swaps, began, ended)
        assert text in {expected[v][prompt] for v in allowed}, (
            f"{prompt!r} -> {text!r}: versions that may have served it: {sorted(allowed)}, "
            f"whose answer it is: {[v for v, known in enumerate(expected) if known[prompt] == text] or 'nobody'}"
        )


def _ask(url: str, seed: int, done: threading.Event) -> list[tuple[float, float, str, str]]:
    """(began, ended, prompt, answer) of requests, one after the other."""
    choice, answers = random.Random(seed), []
    with httpx.Client(base_url=url, timeout=120) as client:
        while not done.is_set():
            prompt, began = choice.choice(PROMPTS), time.monotonic()
            text = complete(client, "hot", prompt, TOKENS)
            answers.append((began, time.monotonic(), prompt, text))
    return answers


def _allowed(swaps: list[tuple[float, float, int]], began: float, ended: float) -> set[int]:
    """Versions that were current at some instant of a request's life."""
    successors = itertools.chain((answered for _, answered, _ in swaps[1:]), (float("inf"),))
    return {
        version
        for (asked, _, version), until in zip(swaps, successors, strict=True)
        if asked <= ended and began <= until
    }
