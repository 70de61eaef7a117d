"""The commands against a real server: an adapter's whole life, a chat, and what the doctor says of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

BASE = "smollm2-135m-instruct"


def loramux(server: Any, *argv: object, lines: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loramux", *map(str, argv), "--url", server.url]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=180, check=False)


def card(server: Any, *argv: object) -> dict[str, Any]:
    done = loramux(server, "adapters", *argv, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_an_adapters_life(server: Any, spare_adapters: Path) -> None:
    first = card(server, "add", "cli", spare_adapters / "spare0", "--pin")
    assert (first["state"], first["pinned"], first["rank"]) == ("resident", True, 4)
    wrong = loramux(server, "adapters", "add", "cli", spare_adapters / "spare1", "--if-match", "00" * 8)
    assert wrong.returncode == 1 and "(precondition_failed)" in wrong.stderr
    second = card(server, "add", "cli", spare_adapters / "spare1", "--if-match", first["version"])
    assert (second["rank"], second["previous"]) == (8, first["version"])
    assert card(server, "rollback", "cli")["version"] == first["version"]
    assert not card(server, "unpin", "cli")["pinned"]
    listed = loramux(server, "adapters", "ls")
    assert re.search(rf"^cli +resident +{first['version']} +lora +4 ", listed.stdout, re.MULTILINE)
    assert card(server, "rm", "cli")["state"] in ("draining", "gone")
    gone = loramux(server, "adapters", "show", "cli")
    assert gone.returncode == 1 and "(model_not_found)" in gone.stderr


def test_a_refused_adapter_says_why(server: Any, tmp_path: Path) -> None:
    outside = loramux(server, "adapters", "add", "cli", tmp_path)
    assert outside.returncode == 1 and "(adapter_path_not_allowed)" in outside.stderr


def test_chat(server: Any) -> None:
    lines = "What is the capital of France?\n/model sarcasm\n/models\n/nonsense\n"
    done = loramux(server, "chat", "--temperature", 0, "--max-tokens", 16, lines=lines)
    assert "Paris" in done.stdout and "(sarcasm answers)" in done.stdout
    assert re.search(r"^\* +sarcasm +resident", done.stdout, re.MULTILINE)
    once = loramux(server, "chat", "sarcasm", "--once", "Hi", "--max-tokens", 4)
    assert once.returncode == 0 and once.stdout.strip()


def test_the_doctor_finds_the_server(server: Any) -> None:
    findings = json.loads(loramux(server, "doctor", "--json").stdout)
    found = {finding["subject"]: finding for finding in findings}
    assert found["server"]["level"] == "ok" and f"serves {BASE}: ready" in found["server"]["text"]
    assert found["hooks"]["level"] == "ok"
