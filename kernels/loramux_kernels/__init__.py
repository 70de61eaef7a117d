"""Device operations for batches in which every token may have another LoRA adapter.

    h_TR, l_TE = x_TI @ A_RIᵀ, x_TI @ W_EIᵀ                                                                      shrink
    y_T,slice j ← mag ⊙ y_T,slice j + (gate(l)_T,expert(R) ⊙ scale_R ⊙ h_TR)[:, rows of slice j] @ B_RO + bias   expand

T tokens · I inputs · O outputs of a slice · R rank rows · E experts. Each token takes the weights of its adapter's
slot in an `AdapterPool`; a base token (slot −1) is left alone. A plain adapter has no router W and a gate, mag of one
and bias of zero.
"""

from loramux_kernels.errors import (
    KernelError,
    NotWritten,
    PoolFull,
    RankTooLarge,
    UnknownModule,
    UnknownSlot,
    WrongShape,
)
from loramux_kernels.gates import MAX_EXPERTS, TokenGate
from loramux_kernels.geometry import BAND_UNIT, Geometry, Layouts
from loramux_kernels.layout import Layout
from loramux_kernels.ops.expand import expand
from loramux_kernels.ops.shrink import shrink
from loramux_kernels.pool import AdapterPool
from loramux_kernels.sequences import CountRows
from loramux_kernels.sites import SiteSpec
from loramux_kernels.weights import Memory, blocks_of

__all__ = [
    "BAND_UNIT",
    "MAX_EXPERTS",
    "AdapterPool",
    "CountRows",
    "Geometry",
    "KernelError",
    "Layout",
    "Layouts",
    "Memory",
    "NotWritten",
    "PoolFull",
    "RankTooLarge",
    "SiteSpec",
    "TokenGate",
    "UnknownModule",
    "UnknownSlot",
    "WrongShape",
    "blocks_of",
    "expand",
    "shrink",
]
