"""What the engine and its stager say to each other. `load` is a number that means one attempt, and never another."""

from __future__ import annotations

from dataclasses import dataclass

from loramux.staging.placement import BaseBiases
from loramux_kernels import AdapterPool, Geometry, Layouts

PIECE_BYTES = 8 * 2**20
"""What the engine issues between two steps, and an urgent copy may have to wait for: 0.2 ms on a link of 40 GB/s."""
CPU_PIECE_BYTES = 2**20
"""The same where the engine's thread does the copy, into memory that nobody may have touched yet: 0.5 ms."""
PIECES = 4


@dataclass(frozen=True)
class Setup:
    """What a stager is made for. `base_biases`: see `placement`."""

    geometry: Geometry
    base_biases: BaseBiases
    piece_bytes: int = PIECE_BYTES
    pieces: int = PIECES

    @classmethod
    def of(cls, pool: AdapterPool, base_biases: BaseBiases) -> Setup:
        piece_bytes = CPU_PIECE_BYTES if pool.device.type == "cpu" else PIECE_BYTES
        return cls(pool.geometry, base_biases, piece_bytes)


# -- engine -> stager


@dataclass(frozen=True)
class Load:
    """`lender`: the artefact of an adapter in the pool. B that is the same there, bit for bit, is left out."""

    load: int
    artefact: str
    lender: str | None = None


@dataclass(frozen=True)
class Cancel:
    load: int


@dataclass(frozen=True)
class Free:
    """The stager may write into this piece of the buffer. All are the engine's at first."""

    piece: int


ToStager = Load | Cancel | Free


# -- stager -> engine, in this order: Planned, any number of Staged; Failed ends a load at any time


@dataclass(frozen=True)
class Planned:
    """The artefact is sound, and this is the room that it needs. `mixture`: it has routers."""

    load: int
    layouts: Layouts
    mixture: bool


@dataclass(frozen=True)
class Staged:
    """The next `nbytes` of the image lie at the start of a piece, which is the engine's until it is freed."""

    load: int
    piece: int
    nbytes: int
    last: bool


@dataclass(frozen=True)
class Failed:
    """`code` and `message` are for the user; `detail` is for the log."""

    load: int
    code: str
    message: str
    detail: str = ""


ToEngine = Planned | Staged | Failed
