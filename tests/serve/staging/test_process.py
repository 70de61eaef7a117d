"""The stager's process: what it stages is the adapter, and it outlives nobody."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loramux.staging import Failed, Planned, Setup, Staged, Staging, StagingEnded
from loramux_adapters.artefact import digest_of, write_artefact
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_kernels import Geometry, Memory, SiteSpec

SETUP = Setup(Geometry((SiteSpec("o_proj", ("o_proj",), 24, (16,)),), torch.bfloat16, 64), {}, 256, 2)
SITE = LoweredSite(torch.randn(5, 24), torch.randn(5, 16), torch.rand(5))

ENGINE = """
import os, pickle, signal, sys, time
from loramux.staging import Staging
staging = Staging(pickle.loads(bytes.fromhex(sys.argv[1])))
staging.begin(1, "nowhere")
while staging.receive(1) is None:
    time.sleep(0.01)
with open(f"/proc/self/task/{os.getpid()}/children") as file:
    stager = file.read().strip()
if not (sleeper := os.fork()):
    time.sleep(60)  # with all that was open, the engine's end of the connection too
print(stager, sleeper, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def staging() -> Iterator[Staging]:
    staging = Staging(SETUP)
    yield staging
    staging.close()


@pytest.fixture
def artefact(tmp_path: Path) -> str:
    adapter = LoweredAdapter("lora", {"o_proj": SITE})
    return str(write_artefact(adapter, "base", digest_of(adapter), tmp_path))


def receive(staging: Staging, load: int) -> Planned | Staged | Failed:
    deadline = time.monotonic() + 60
    while (message := staging.receive(load)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return message


def image(staging: Staging, load: int) -> torch.Tensor:
    pieces = []
    while True:
        staged = receive(staging, load)
        assert isinstance(staged, Staged) and staged.nbytes <= SETUP.piece_bytes
        pieces.append(staging.data(staged).clone())
        staging.give_back(staged.piece)
        if staged.last:
            return torch.cat(pieces)


def check_load(staging: Staging, load: int, artefact: str) -> None:
    staging.begin(load, artefact)
    planned = receive(staging, load)
    assert isinstance(planned, Planned) and not planned.mixture
    whole = image(staging, load)
    assert whole.numel() == planned.layouts[0].nbytes
    weights = Memory.of(whole, torch.bfloat16).at(SETUP.geometry.sites[0], 0, planned.layouts[0])
    assert torch.equal(weights.a, SITE.a.bfloat16()) and torch.equal(weights.scale, SITE.scale)
    assert torch.equal(weights.slices[0].b, SITE.b.bfloat16())


def children() -> set[int]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in listed if b"loramux.staging" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def test_another_process_stages_the_adapter_and_can_be_killed(staging: Staging, artefact: str) -> None:
    check_load(staging, 1, artefact)
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StagingEnded):
        receive(staging, 1)
    with pytest.raises(StagingEnded):
        staging.begin(2, artefact)
    staging.restart()
    check_load(staging, 3, artefact)
    assert len(children()) == 1


def test_what_cannot_be_read_is_told_and_the_process_lives(staging: Staging, artefact: str) -> None:
    before = children()
    Path(artefact).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    staging.begin(10, artefact)
    failed = receive(staging, 10)
    assert isinstance(failed, Failed) and failed.code == "adapter_unreadable"
    assert artefact not in failed.message and "Traceback" in failed.detail
    assert children() == before


def test_it_ends_with_the_engine_whoever_else_holds_the_connection() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", ENGINE, pickle.dumps(SETUP).hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as engine:
        assert engine.stdout is not None
        stager, sleeper = map(int, engine.stdout.readline().split())
        try:
            assert engine.wait(10) == -signal.SIGKILL
            deadline = time.monotonic() + 20
            while Path(f"/proc/{stager}").exists() and "Z" not in Path(f"/proc/{stager}/stat").read_text().split()[2]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            os.kill(sleeper, signal.SIGKILL)
