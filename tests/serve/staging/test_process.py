"""The stager's process: what it stages is the adapter, and it outlives nobody."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loramux.staging import Failed, Planned, Setup, Staged, Staging, StagingEnded
from loramux.staging.launch import BINDING, cores, environment
from loramux_adapters.artefact import digest_of, write_artefact
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_kernels import Geometry, Memory, SiteSpec

SETUP = Setup(Geometry((SiteSpec("o_proj", ("o_proj",), 24, (16,)),), torch.bfloat16, 64, 16), {}, 256, 2)
LINE = 128
SITE = LoweredSite(torch.randn(5, 24), torch.randn(5, 16), torch.rand(5))

ENGINE = """
import json, os, pickle, signal, sys, time
from loramux.staging import Staging
staging = Staging(pickle.loads(bytes.fromhex(sys.argv[1])))
staging.begin(1, "nowhere")
while staging.receive(1) is None:  # it answers when all that it imports is there
    time.sleep(0.01)
with open(f"/proc/self/task/{os.getpid()}/children") as file:
    stager = file.read().strip()
"""
DIES = """
if not (sleeper := os.fork()):
    time.sleep(60)  # with all that was open, the engine's end of the connection too
print(stager, sleeper, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
TELLS = """
threads = map(int, os.listdir(f"/proc/{stager}/task"))
stagers = [sorted(os.sched_getaffinity(thread)) for thread in threads]
print(json.dumps([sorted(os.sched_getaffinity(0)), stagers, os.getsid(int(stager)) == os.getsid(0)]))
staging.close()
"""


@pytest.fixture(scope="module")
def others() -> set[int]:
    """Stagers of engines that other tests have started in this process."""
    return children()


@pytest.fixture(scope="module")
def staging(others: set[int]) -> Iterator[Staging]:
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


def check_borrower(staging: Staging, load: int, folder: Path, lender: str) -> None:
    adapter = LoweredAdapter("lora", {"o_proj": replace(SITE, a=SITE.a + 1)})
    staging.begin(load, str(write_artefact(adapter, "base", digest_of(adapter), folder)), lender)
    planned = receive(staging, load)
    assert isinstance(planned, Planned) and planned.layouts[0].borrowed == {0}
    whole = image(staging, load)
    assert whole.numel() == planned.layouts[0].nbytes == 2 * LINE + LINE  # A, scale
    weights = Memory.of(whole, torch.bfloat16).at(SETUP.geometry.sites[0], 0, planned.layouts[0])
    assert torch.equal(weights.a, (SITE.a + 1).bfloat16()) and torch.equal(weights.scale, SITE.scale)
    assert weights.slices[0].b.is_meta


def children() -> set[int]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in listed if b"loramux.staging" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def engine_process(does: str, **variables: str) -> subprocess.Popen[bytes]:
    """A process that has started a stager, and then `does`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    command = [sys.executable, "-P", "-c", ENGINE + does, pickle.dumps(SETUP).hex()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


def test_another_process_stages_the_adapter_and_can_be_killed(
    staging: Staging, artefact: str, others: set[int]
) -> None:
    check_load(staging, 1, artefact)
    (pid,) = children() - others
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StagingEnded):
        receive(staging, 1)
    with pytest.raises(StagingEnded):
        staging.begin(2, artefact)
    staging.restart()
    check_load(staging, 3, artefact)
    check_borrower(staging, 4, Path(artefact).parent, artefact)
    assert len(children() - others) == 1


def test_what_cannot_be_read_is_told_and_the_process_lives(staging: Staging, artefact: str) -> None:
    before = children()
    Path(artefact).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    staging.begin(10, artefact)
    failed = receive(staging, 10)
    assert isinstance(failed, Failed) and failed.code == "adapter_unreadable"
    assert artefact not in failed.message and "Traceback" in failed.detail
    assert children() == before


def test_it_ends_with_the_engine_whoever_else_holds_the_connection() -> None:
    with engine_process(DIES) as engine:
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


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_an_engine_that_openmp_binds_to_a_core_leaves_it_the_others() -> None:
    """As vLLM starts its worker on a CPU, whose steps keep that core busy: OpenMP's runtime binds the process that
    loads it, here before the interpreter's first instruction, and so it would bind every process that inherits this."""
    allowed = sorted(os.sched_getaffinity(0))
    runtime = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), "")
    with engine_process(TELLS, GOMP_CPU_AFFINITY=str(allowed[-1]), LD_PRELOAD=str(runtime)) as engine:
        assert engine.stdout is not None
        engines, stagers, same_session = json.loads(engine.stdout.read())
    if engines != allowed[-1:]:
        pytest.skip("torch's OpenMP is not GNU's")
    assert stagers == [allowed]
    assert same_session  # between sessions, Linux may give it nothing of a core where it is the nice one


def test_what_the_engine_is_told_of_threads_is_not_told_to_the_stager() -> None:
    engines = {
        "LD_LIBRARY_PATH": "/lib",
        "LC_ALL": "C",
        "HF_TOKEN": "secret",
        "OMP_NUM_THREADS": "8",
        "LD_PRELOAD": "x",
    }
    binding = dict.fromkeys((*BINDING, "KMP_BLOCKTIME", "MKL_NUM_THREADS"), "1")
    told = environment(engines | binding)
    assert set(told) == {
        "LD_LIBRARY_PATH",
        "LC_ALL",
        "LD_PRELOAD",
        "PYTHONPATH",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
    }
    assert told["OMP_NUM_THREADS"] == "1"


def test_a_mask_that_is_not_of_openmp_stays() -> None:
    """An operator's, or vLLM's for the memory next to a GPU."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores({}) == {min(allowed)}
        assert cores({"OMP_PLACES": "{0}"}) >= {min(allowed)} | os.sched_getaffinity(os.getppid())
    finally:
        os.sched_setaffinity(0, allowed)
