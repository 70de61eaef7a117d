"""The emulator itself: what a kernel must not do is noticed, whoever runs first."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from . import guarded
from .driver import EmulatedError, Emulator

SOURCE = Path(__file__).with_name("faults.cu").read_text()
NAMES = re.findall(r"\b[A-Z_]+\b(?=,\n)", SOURCE.split("enum Fault {")[1].split("}")[0])
# By name: what is said of it, and whether it takes two blocks.
FAULTS = {
    "NO_BARRIER": ("in no order|nobody wrote", False),
    "NO_WARP_BARRIER": ("in no order", False),
    "DIVERGENT_BARRIER": ("in no order|nobody wrote|threads wait for each other", False),
    "DIVERGENT_EXCHANGE": ("different exchanges", False),
    "PART_OF_A_WARP": ("part of a warp", False),
    "UNWRITTEN_SHARED": ("nobody wrote", False),
    "BEYOND_SHARED": ("beyond its", False),
    "BEYOND_MEMORY": ("not its memory", False),
    "BEYOND_AN_ARRAY": ("undefined behaviour", False),
    "NOT_ALIGNED": ("not aligned", False),
    "NO_WAIT": ("has not arrived", False),
    "WAIT_TOO_SHORT": ("has not arrived", False),
    "NO_COMMIT": ("has not arrived", False),
    "COPY_OF_ANOTHER_LANE": ("has not arrived|in no order|nobody wrote", False),
    "COPY_TOO_EARLY": ("has not arrived|in no order", False),
    "NO_END_OF_COPIES": ("under way", False),
    "NO_RELEASE": ("in no order", True),
    "NO_ACQUIRE": ("in no order", True),
    "SAME_WORD": ("in no order", True),
    "STALE_CACHE": ("as constant", True),
}
SEEDS = 10


class _Arguments(ctypes.Structure):
    _fields_ = (("memory", ctypes.c_void_p), ("which", ctypes.c_int), ("odd", ctypes.c_int))


def run(emulator: Emulator, name: str, blocks: int) -> torch.Tensor:
    memory = guarded.empty((64,), torch.int32).zero_()
    kernel = emulator.kernel("faults.cu", "fault", torch.bfloat16, 32, None)
    kernel.launch(_Arguments(memory.data_ptr(), NAMES.index(name), 1), blocks, 0)
    return memory


@pytest.fixture
def emulator(pytestconfig: pytest.Config, emulator: Emulator) -> Emulator:
    return Emulator(pytestconfig.cache.mkdir("emulated"), emulator.sources | {"faults.cu": SOURCE})


def test_every_fault_is_tried() -> None:
    assert ["NONE", *FAULTS] == NAMES


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed_whoever_runs_first(name: str, emulator: Emulator) -> None:
    message, meeting = FAULTS[name]
    for _ in range(SEEDS):
        with pytest.raises(EmulatedError, match=rf"fault_bfloat16.*({message})"):
            run(emulator, name, 2 if meeting else 1)


def test_what_is_in_order_runs_and_means_the_same(emulator: Emulator) -> None:
    lanes = torch.arange(32)
    for _ in range(SEEDS):
        # The neighbour's number, twice that, and lane 0's.
        assert torch.equal(run(emulator, "NONE", 1)[16:48], 3 * ((lanes + 1) % 32).int())
        assert torch.equal(run(emulator, "NONE", 2)[48:], (lanes[:16] % 8).int())


def test_the_place_of_a_fault_is_named(emulator: Emulator) -> None:
    line = 1 + SOURCE[: SOURCE.index("args.memory[64 + lane]")].count("\n")
    with pytest.raises(EmulatedError, match=rf"faults\.cu:{line} touches 0x"):
        run(emulator, "BEYOND_MEMORY", 1)
