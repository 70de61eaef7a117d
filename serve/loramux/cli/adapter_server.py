"""`loramux adapters ls`, `show NAME` and the verbs that change something: what a running server does."""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

from loramux.cli import adapter_cards, calibrate
from loramux.cli.client import Client, adapter_path
from loramux.cli.terminal import printable, show
from loramux.console import StatusLine
from loramux.errors import LoramuxError

_POLL_S = 0.5


def run(options: argparse.Namespace) -> int:
    """Exit status 0 if the server did it. Raises LoramuxError."""
    client = Client.of(options)
    if options.command == "ls":
        found = client.get("/v1/adapters")
        show(found, adapter_cards.listing(found["data"], found.get("memory")), as_json=options.json)
        return 0
    if options.command == "show":
        card = client.get(adapter_path(options.path))
        show(card, adapter_cards.details(card), as_json=options.json)
        return 0
    if options.command == "calibrate":
        return calibrate.run(client, options)
    if options.command == "add":
        return _add(client, options)
    if options.command == "rm":
        _, card = client.lifecycle("DELETE", options.name, if_match=options.if_match)
    else:
        match = getattr(options, "if_match", None)
        _, card = client.lifecycle("POST", options.name, f"/{options.command}", if_match=match)
    show(card, [adapter_cards.summary(card)], as_json=options.json)
    return 0


def _add(client: Client, options: argparse.Namespace) -> int:
    """One request that waits, and beside it a look at the state now and then. 1 if it was not ready in time."""
    body: dict[str, Any] = {"source": _source(options.path)}
    if options.pin:
        body["pinned"] = True
    request = _Request(client, options, body)
    line, began = StatusLine(), time.monotonic()
    try:
        while not request.done.wait(_POLL_S):
            seconds = time.monotonic() - began
            line.show(f"{options.name}: {_state(client, options.name)}", f" ({seconds:.0f} s)")
    finally:
        line.clear()
    status, card = request.result()
    ready = status != 202
    text = adapter_cards.summary(card)
    if not ready:
        text += f"; still loading. Look again: loramux adapters show {options.name}"
    show(card, [text], as_json=options.json)
    return 0 if ready or options.wait == 0 else 1


class _Request:
    """The PUT in a thread: its answer is what counts, however the polls beside it fare."""

    def __init__(self, client: Client, options: argparse.Namespace, body: dict[str, Any]) -> None:
        self.done = threading.Event()
        self._answer: tuple[int, dict[str, Any]] | None = None
        self._error: BaseException | None = None
        self._put = (client, options, body)
        threading.Thread(target=self._run, daemon=True).start()  # daemon: Ctrl-C need not wait for it

    def result(self) -> tuple[int, dict[str, Any]]:
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def _run(self) -> None:
        client, options, body = self._put
        try:
            self._answer = client.lifecycle(
                "PUT", options.name, body=body, if_match=options.if_match, wait_s=options.wait
            )
        except BaseException as error:  # raised again by result()
            self._error = error
        finally:
            self.done.set()


def _state(client: Client, name: str) -> str:
    try:
        card = client.get(adapter_path(name))
        return printable(str(card.get("pending") or card["state"]))  # pending: the version that is to replace it
    except LoramuxError:
        return "asked for"  # the server may not list it yet


def _source(path: str) -> str:
    """A path that means the same wherever the server runs: one that exists here is made absolute."""
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path
