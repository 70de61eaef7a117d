"""`loramux adapters` against a server: what is sent, what is printed, and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loramux.cli import adapter_server, main

from ..fake_server import FakeServer, card, error, proxy_page

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *argv: object) -> tuple[int, str, str]:
    status = main(["adapters", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


def test_ls(server: FakeServer, capsys: Capture) -> None:
    status, out, _ = run(capsys, "ls")
    rows = [line.split() for line in out.splitlines()]
    assert status == 0
    assert rows[0] == ["name", "state", "version", "method", "rank", "size", "leases", "pinned"]
    assert rows[1] == ["sql", "resident", "00112233aabbccdd", "lora", "8", "3.00", "MiB", "2", "yes"]
    assert rows[2] == ["bad", "failed", "-", "-", "-", "-", "0", "no"]
    assert "bad: NaN at layer 3. (adapter_not_finite)" in out and "Use an earlier checkpoint." in out
    assert "1 resident, 3.00 MiB of 1.00 GiB in use" in out


def test_ls_of_an_empty_server_says_how_to_go_on(server: FakeServer, capsys: Capture) -> None:
    server.cards.clear()
    assert "loramux adapters add" in run(capsys, "ls")[1]


def test_ls_for_a_program_is_the_servers_answer(server: FakeServer, capsys: Capture) -> None:
    found = json.loads(run(capsys, "ls", "--json")[1])
    assert found["data"] == list(server.cards.values()) and found["memory"]["slots"] == 1024


def test_show_a_name(server: FakeServer, capsys: Capture) -> None:
    server.cards["sql"] |= {"warnings": ["mind the gap"], "pending": "verifying"}
    status, out, _ = run(capsys, "show", "sql")
    rows = {line[:10].strip(): line[10:] for line in out.splitlines()}
    assert status == 0
    assert (rows["version"], rows["state"]) == ("00112233aabbccdd", "resident, next verifying")
    assert rows["loaded in"] == "0.15 s (read 0.10, verify 0.02, copy 0.03)"
    assert (rows["warning"], rows["previous"], rows["last used"]) == ("mind the gap", "-", "never")
    assert "NaN at layer 3." in run(capsys, "show", "bad")[1]


def test_show_prefers_what_lies_here_unless_told(
    server: FakeServer, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sql").mkdir()
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "show", "sql")
    assert status == 1 and "adapter_not_found" in out  # the folder is empty
    assert run(capsys, "show", "sql", "--url", server.url)[0] == 0


@pytest.mark.parametrize("path", ["./sql", "/sql", "~/sql", "sql.safetensors", "my sql"])
def test_what_cannot_be_a_name_is_a_path(server: FakeServer, capsys: Capture, path: str) -> None:
    assert run(capsys, "show", path, "--base", "/nowhere")[0] == 1
    assert run(capsys, "show", path)[0] == 1
    assert server.seen == []


@pytest.mark.parametrize(
    ("argv", "method", "path", "match"),
    [
        (["rm", "sql"], "DELETE", "/v1/adapters/sql", None),
        (["rm", "sql", "--if-match", "00112233aabbccdd"], "DELETE", "/v1/adapters/sql", '"00112233aabbccdd"'),
        (["rm", "sql", "--if-match", "sql@00112233aabbccdd"], "DELETE", "/v1/adapters/sql", '"00112233aabbccdd"'),
        (["pin", "sql"], "POST", "/v1/adapters/sql/pin", None),
        (["unpin", "sql"], "POST", "/v1/adapters/sql/unpin", None),
        (["pin", "team/a:b"], "POST", "/v1/adapters/team/a:b/pin", None),
    ],
)
def test_changes(
    server: FakeServer, capsys: Capture, argv: list[str], method: str, path: str, match: str | None
) -> None:
    server.cards["team/a:b"] = card("team/a:b")
    status, out, _ = run(capsys, *argv)
    sent = server.seen[-1]
    assert (status, sent.method, sent.path, sent.headers.get("if-match")) == (0, method, path, match)
    assert out.startswith(f"{argv[1]} is ")
    server.cards["sql"] = card("sql")
    assert json.loads(run(capsys, *argv, "--json")[1])["name"] == argv[1]


def test_a_refusal_has_message_code_and_hint(server: FakeServer, capsys: Capture) -> None:
    status, out, err = run(capsys, "rollback", "sql", "--if-match", "00" * 32)
    assert (status, out) == (1, "")
    assert err == "loramux adapters rollback: sql has no previous version. (no_previous_version)\nAdd one.\n"
    status, out, err = run(capsys, "rollback", "sql", "--json")
    assert (status, err) == (1, "")
    assert json.loads(out) == {
        "error": {"code": "no_previous_version", "message": "sql has no previous version.", "hint": "Add one."}
    }


def test_add_sends_what_means_the_same_to_the_server(
    server: FakeServer, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, sent in {"here": str(tmp_path / "here"), "not/here": "not/here", "/srv/a": "/srv/a"}.items():
        assert run(capsys, "add", "new", given)[0] == 0
        assert server.seen[-1].body == {"source": sent}
    status, out, _ = run(capsys, "add", "new", "here", "--pin", "--wait", "7", "--if-match", "00" * 8)
    sent_last = server.seen[-1]
    assert (sent_last.body["pinned"], sent_last.path) == (True, "/v1/adapters/new?wait=7")
    assert sent_last.headers["if-match"] == '"0000000000000000"'
    assert (status, out) == (0, "new is resident, version 00112233aabbccdd, lora of rank 8, 3.00 MiB, pinned\n")


def test_add_tells_the_states_on_the_way(server: FakeServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_server, "_POLL_S", 0.02)
    server.loading = ["reading", "reading", "verifying", "\x1b[2Jhost"]
    status, out, err = run(capsys, "add", "new", "/srv/a", "--json")
    assert (status, json.loads(out)["state"]) == (0, "resident")
    lines = err.splitlines()
    if lines[0] == "new: asked for":  # looked at before the server had heard of it
        del lines[0]
    assert lines == ["new: reading", "new: verifying", "new: [2Jhost"]


@pytest.mark.parametrize(("wait", "expected"), [("0", 0), ("0.05", 1)])
def test_add_that_is_not_ready_in_time(server: FakeServer, capsys: Capture, wait: str, expected: int) -> None:
    """Not to wait is what was asked for; to wait in vain is not."""
    server.loading = ["verifying"] * 99
    status, out, _ = run(capsys, "add", "new", "/srv/a", "--wait", wait)
    assert status == expected
    assert "new is verifying" in out and "loramux adapters show new" in out


def test_add_refused(server: FakeServer, capsys: Capture) -> None:
    server.answer = error(403, "adapter_path_not_allowed", "No.", "Start with --adapter-root.")
    status, out, err = run(capsys, "add", "new", "/etc")
    assert (status, out) == (1, "")
    assert err == "loramux adapters add: No. (adapter_path_not_allowed)\nStart with --adapter-root.\n"


def test_a_proxy_in_between(server: FakeServer, capsys: Capture) -> None:
    server.answer = proxy_page(502)
    status, _, err = run(capsys, "ls")
    assert status == 1 and "502" in err and "\x1b" not in err


def test_no_server(capsys: Capture) -> None:
    status, _, err = run(capsys, "ls", "--url", "127.0.0.1:1", "--key", "secret")
    assert status == 1
    assert err.startswith("loramux adapters ls: Nothing answers at http://127.0.0.1:1. (server_unreachable)\nStart one")
    assert "secret" not in err


@pytest.mark.parametrize(
    "argv",
    [
        ["frobnicate"],
        ["add", "new"],
        ["add", "-new", "/srv/a"],
        ["add", "a b", "/srv/a"],
        ["add", "new", "/srv/a", "--wait", "soon"],
        ["add", "new", "/srv/a", "--wait", "-1"],
        ["add", "new", "/srv/a", "--wait", "nan"],
        ["rm", ".."],
        ["rm", "sql", "--if-match", "latest"],
        ["rm", "sql", "--if-match", "0011"],
    ],
)
def test_a_malformed_command_line_sends_nothing(server: FakeServer, capsys: Capture, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(capsys, *argv)
    assert caught.value.code == 2 and server.seen == []


def test_it_needs_no_torch_and_ends_quietly_when_its_reader_leaves(server: FakeServer) -> None:
    """`loramux adapters ls | head -0`."""
    code = (
        "import sys\nfrom loramux.cli import main\nstatus = main(['adapters', 'ls'])\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), 'slow imports'\nsys.exit(status)"
    )
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=closed, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "")


CARD = {
    "id": "cal-1", "method": "platt", "n": 40, "ece": 0.05, "before": {"ece": 0.3}, "evaluated": "5-fold",
    "threshold": {"score": "total", "value": 0.25, "coverage": 0.5, "bound": 0.08, "delta": 0.05},
}  # fmt: skip


def test_calibrate(server: FakeServer, capsys: Capture, tmp_path: Path) -> None:
    server.app.post("/v1/uncertainty/calibrate")(lambda: CARD)
    items = [{"prompt": "1", "label": "spam"}, {"prompt": "2", "label": "ham"}]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n\n")
    asked = (
        "calibrate",
        "sql",
        tmp_path / "items.jsonl",
        "--labels",
        "spam,ham",
        "--samples",
        "4",
        "--method",
        "platt",
    )
    status, out, _ = run(capsys, *asked)
    assert status == 0 and "0.300 before, 0.050" in out and "where total is above 0.25" in out and "50%" in out
    settings = {"mode": "decide", "labels": ["spam", "ham"], "samples": 4}
    assert server.seen[-1].body == {"model": "sql", "data": items, "uncertainty": settings, "method": "platt"}
    assert json.loads(run(capsys, *asked, "--json")[1]) == CARD
    run(capsys, "calibrate", "sql", tmp_path / "items.jsonl")
    assert server.seen[-1].body == {"model": "sql", "data": items, "uncertainty": {}}


def test_calibrate_with_what_is_no_file_of_items(server: FakeServer, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "broken").write_text('{"prompt": 1}\n{"prompt\n')
    (tmp_path / "deep").write_text("[" * 10**5)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, said in (("broken", "line 2"), ("deep", "line 1"), ("binary", "cannot be read"), ("none", "none")):
        status, _, err = run(capsys, "calibrate", "sql", tmp_path / name)
        assert status == 1 and said in err and "config_invalid" in err
    assert not server.seen
