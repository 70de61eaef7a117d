"""The base model that texts run through, and how far outputs move on them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.applied import AppliedSite, applied
from loramux_adapters.lowered import LoweredAdapter


def load_model(place: str | Path) -> tuple[Any, Any]:
    """The model in float32 on the CPU, and its tokeniser; nothing is downloaded. Raises OSError or ValueError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: Any = {"trust_remote_code": False, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(place, **options)


def output_errors(
    model: Any, before: LoweredAdapter, after: LoweredAdapter, texts: Iterable[torch.Tensor]
) -> dict[str, float]:
    """By module √(Σ_t ‖δ'_t − δ_t‖² / Σ_t ‖δ_t‖²): δ is what the adapter adds to the layer, gates included.

    Both are given the inputs that the layer has with `before`. 1 where the module is not adapted any more.
    """
    sites = {module: (_applied(before, module), _applied(after, module)) for module in before.sites}
    sums = {module: torch.zeros(2, dtype=torch.float64) for module in before.sites}

    def observe(module: str, x: torch.Tensor) -> None:
        old, new = sites[module]
        assert old is not None
        wanted = old.delta(x)
        found = torch.zeros_like(wanted) if new is None else new.delta(x)
        sums[module] += torch.stack([(found - wanted).double().square().sum(), wanted.double().square().sum()])

    with applied(model, before, observe), torch.inference_mode():
        for ids in texts:
            model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
    return {module: float((moved / size).sqrt()) if size > 0 else 0.0 for module, (moved, size) in sums.items()}


def _applied(adapter: LoweredAdapter, module: str) -> AppliedSite | None:
    site = adapter.sites.get(module)
    if site is None:
        return None
    return AppliedSite(site, None if site.gate is None else adapter.gates[site.gate])
