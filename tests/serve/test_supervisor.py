"""The supervisor with small programs in the server's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from loramux import supervisor

SERVER = """
    import os, signal, sys, time
    from pathlib import Path
    from loramux.supervisor import announce_ready
    runs = Path(sys.argv[1])
    with runs.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    number = len(runs.read_text().splitlines())
"""
SUPERVISOR = """
    import sys
    from loramux import supervisor
    supervisor._PAUSE_S = 0.0
    supervisor._STOP_S = 2.0
    sys.exit(supervisor.supervise([sys.executable, "-c", sys.argv[1], sys.argv[2]]))
"""


def _start(tmp_path: Path, server: str) -> tuple[subprocess.Popen[bytes], Path]:
    runs = tmp_path / "runs"
    runs.touch()
    program = textwrap.dedent(SERVER) + textwrap.dedent(server)
    root = Path(supervisor.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SUPERVISOR), program, str(runs)],
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    return process, runs


def _pids(runs: Path, count: int) -> list[int]:
    """Of the servers started so far, once there are `count`."""
    deadline = time.monotonic() + 20
    while len(pids := runs.read_text().split()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(pid) for pid in pids]


@pytest.mark.parametrize(("death", "status"), [("sys.exit(3)", 3), ("sys.exit(0)", 0)])
def test_one_that_was_never_ready_is_not_started_again(tmp_path: Path, death: str, status: int) -> None:
    process, runs = _start(tmp_path, death)
    assert process.wait(20) == status
    assert len(_pids(runs, 1)) == 1


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(0)", "sys.exit(7)"])
def test_one_that_was_ready_comes_back_until_it_crashes_too_often(tmp_path: Path, death: str) -> None:
    process, runs = _start(tmp_path, f"\nannounce_ready()\n{death}\n")
    assert process.wait(60) != 0
    assert len(_pids(runs, 1)) == supervisor.MAX_CRASHES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_passed_on_and_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    server = """
        def stop(*_):
            runs.with_name("stopped").touch()
            sys.exit(0)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        announce_ready()
        runs.with_name("ready").touch()
        time.sleep(60)
    """
    process, runs = _start(tmp_path, textwrap.dedent(server))
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert (tmp_path / "stopped").exists() and len(_pids(runs, 1)) == 1


def test_one_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    server = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        announce_ready()
        runs.with_name("ready").touch()
        time.sleep(60)
    """
    process, _ = _start(tmp_path, textwrap.dedent(server))
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGKILL


def test_the_server_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    process, runs = _start(tmp_path, "\nannounce_ready()\ntime.sleep(60)\n")
    (pid,) = _pids(runs, 1)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while (state := _state(pid)) not in (None, "Z"):
        assert time.monotonic() < deadline, f"the server is still there, state {state}"
        time.sleep(0.01)


def test_what_a_dead_server_leaves_is_swept_away(tmp_path: Path) -> None:
    server = """
        import subprocess
        engine = subprocess.Popen(["sleep", "60"])
        runs.with_name(f"engine{number}").write_text(str(engine.pid))
        announce_ready()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process, runs = _start(tmp_path, textwrap.dedent(server))
    process.wait(60)
    engines = [int(path.read_text()) for path in tmp_path.glob("engine*")]
    assert len(engines) == len(_pids(runs, 1)) == supervisor.MAX_CRASHES
    assert all(_state(pid) in (None, "Z") for pid in engines)


def test_without_a_supervisor_being_ready_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(supervisor.READY_VARIABLE, raising=False)
    supervisor.announce_ready()


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
