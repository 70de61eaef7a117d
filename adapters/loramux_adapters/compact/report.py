"""What compaction saved and what it cost, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.compact.adapter import Compacted
from loramux_adapters.footprint import pool_bytes
from loramux_adapters.lowered import LoweredAdapter


@dataclass(frozen=True)
class ModuleError:
    """A module's: √(Σ_e f_e ‖ΔW'_e − ΔW_e‖²_F / Σ_e f_e ‖ΔW_e‖²_F), the largest of one expert, and of outputs.

    f_e: how much the router uses expert e, 1 for a plain LoRA. `outputs` where calibration texts were given.
    """

    weights: float
    worst_expert: float
    outputs: float | None = None


def module_errors(result: Compacted, outputs: Mapping[str, float] | None = None) -> dict[str, ModuleError]:
    errors = {}
    for module, site in result.sites.items():
        gate = result.before.sites[module].gate
        usage = [1.0] if gate is None else result.usage[gate].tolist()
        moved = sum(f * d * d for f, d in zip(usage, site.distances, strict=True))
        size = sum(f * n * n for f, n in zip(usage, site.norms, strict=True))
        each = [d / n for d, n in zip(site.distances, site.norms, strict=True) if n > 0]
        errors[module] = ModuleError(
            (moved / size) ** 0.5 if size > 0 else 0.0,
            max(each, default=0.0),
            None if outputs is None else outputs[module],
        )
    return errors


def sizes(adapter: LoweredAdapter, base: BaseModel) -> dict[str, Any]:
    """Bytes, ranks and experts of one adapter."""
    experts = [gate.experts for gate in adapter.gates.values()]
    return {
        "file_bytes": adapter.nbytes(),
        "pool_bytes": {
            str(dtype).removeprefix("torch."): pool_bytes(adapter, base, dtype)
            for dtype in (torch.bfloat16, torch.float32)
        },
        "sites": len(adapter.sites),
        "rank_rows": sum(adapter.ranks.values()),
        "experts": sum(experts) / len(experts) if experts else 1.0,
    }
