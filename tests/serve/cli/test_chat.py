"""`loramux chat`: what is sent turn by turn, what is printed, and that an interruption ends one answer only."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest

from loramux.cli import chat as module
from loramux.cli import main
from loramux.cli.client import Client

from ..fake_server import BASE, FakeServer

Capture = pytest.CaptureFixture[str]


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, *argv: str, lines: tuple[str, ...] = ()
) -> tuple[int, str, str]:
    """A chat whose standard input is a pipe with `lines`."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status = main(["chat", *argv])
    out, err = capsys.readouterr()
    return status, out, err


def asked(server: FakeServer) -> list[tuple[str, list[tuple[str, str]]]]:
    """Model and messages of every request."""
    bodies = [seen.body for seen in server.seen if seen.method == "POST"]
    return [(body["model"], [(m["role"], m["content"]) for m in body["messages"]]) for body in bodies]


def test_one_answer(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    options = ("--max-tokens", "5", "--temperature", "0", "--system", "Be brief.")
    status, out, _ = run(monkeypatch, capsys, "sql", "--once", "select it", *options)
    assert (status, out) == (0, "sql: select it\n")
    body = server.seen[-1].body
    assert (body["max_tokens"], body["temperature"]) == (5, 0)
    assert asked(server) == [("sql", [("system", "Be brief."), ("user", "select it")])]


def test_a_conversation_from_a_pipe(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    lines = ("one", "", "/model sql", "two", "/system Be kind.", "/reset", "three", "/system", "/quit", "never")
    status, out, err = run(monkeypatch, capsys, lines=lines)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"{BASE}: one",
        "(sql answers)",
        "sql: two",
        "(system prompt: Be kind.)",
        "(forgotten)",
        "sql: three",
        "(system prompt: none)",
    ]
    assert asked(server) == [
        (BASE, [("user", "one")]),
        ("sql", [("user", "one"), ("assistant", f"{BASE}: one"), ("user", "two")]),
        ("sql", [("system", "Be kind."), ("user", "three")]),
    ]


def test_models_are_listed_with_the_current_one_marked(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    rows = [line.split() for line in run(monkeypatch, capsys, "sql", lines=("/models",))[1].splitlines()]
    assert rows == [[BASE, "base", "model"], ["*", "sql", "resident", "lora,", "rank", "8"], ["bad", "failed"]]


@pytest.mark.parametrize("name", ["sql@00112233", f"{BASE}:sql", f"{BASE}:sql@0011", BASE])
def test_names_that_the_server_understands(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture, name: str
) -> None:
    server.cards[name] = server.cards["sql"]  # the fake's stand-in for resolving it
    assert run(monkeypatch, capsys, name, "--once", "x")[:2] == (0, f"{name}: x\n")


def test_a_name_that_is_not_there(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    status, _, err = run(monkeypatch, capsys, "sqk", "--once", "x")
    assert status == 1 and "There is no model sqk" in err and "Did you mean sql?" in err
    status, out, err = run(monkeypatch, capsys, lines=("/model zzz", "still here"))
    assert status == 1 and "/models lists them" in err and out == f"{BASE}: still here\n"


@pytest.mark.parametrize("line", ["/model", "/frobnicate", "/help"])
def test_the_commands_are_explained(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture, line: str
) -> None:
    status, out, _ = run(monkeypatch, capsys, lines=(line,))
    assert "/system TEXT" in out and status == (0 if line == "/help" else 1)


@pytest.mark.parametrize(
    ("prompt", "message"), [("break", "It broke.\nSee the log."), ("cut", "The answer broke off.")]
)
def test_a_failed_turn_is_forgotten_and_remembered_in_the_status(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture, prompt: str, message: str
) -> None:
    status, out, err = run(monkeypatch, capsys, lines=(prompt, "again"))
    assert status == 1 and message in err
    assert out.splitlines() == [f"{BASE}: {prompt}", f"{BASE}: again"]
    assert asked(server)[-1] == (BASE, [("user", "again")])


def test_a_model_cannot_steer_the_terminal(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = run(monkeypatch, capsys, "--once", "\x1b]0;title\x07 \x9b31m é\tb\r")[1]
    assert out == f"{BASE}: ]0;title 31m é\tb\n"


def test_no_server(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    status, _, err = run(monkeypatch, capsys, "--url", "127.0.0.1:1")
    assert status == 1 and "Nothing answers at http://127.0.0.1:1." in err


def interrupt_at_the_third_piece(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, as Python delivers it while the chat waits for the next piece."""
    real = Client.chat

    def chat(self: Client, body: dict[str, object]) -> Iterator[dict[str, object]]:
        events = real(self, body)
        for _ in range(2):
            yield next(events)
        events.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "chat", chat)


def test_ctrl_c_ends_the_answer_and_not_the_chat(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at_the_third_piece(Client(server.url), patch)
        conversation = module.Chat(Client(server.url), BASE, None, {})
        assert module._converse(conversation, iter(["one two hang"])) == 0
        assert run(patch, capsys, "--once", "one two hang")[0] == 130
    assert server.stopped.wait(5)
    assert conversation.said == [
        {"role": "user", "content": "one two hang"},
        {"role": "assistant", "content": f"{BASE}: one"},
    ]
    capsys.readouterr()
    module._converse(conversation, iter(["/model sql", "go on"]))
    assert capsys.readouterr().out == "(sql answers)\nsql: go on\n"


def test_ctrl_c_and_ctrl_d_at_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    typed: list[str | type[BaseException]] = ["a", KeyboardInterrupt, "b", EOFError]

    def read(_prompt: str) -> str:
        item = typed.pop(0)
        if isinstance(item, str):
            return item
        raise item

    monkeypatch.setattr("builtins.input", read)
    assert list(module._typed()) == ["a", "b"]
    assert "/quit leaves" in capsys.readouterr().out
