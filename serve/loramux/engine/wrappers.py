"""Adapted linears: a vLLM linear layer with the adapters of the batch added to its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from loramux_kernels import SiteSpec, expand, shrink

#: Exactly these types: a subclass may compute something else from the same weights.
ADAPTABLE = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)


class AdaptedLinear(BaseLayerWithLoRA):
    """y = W0 x + b, then y ← mag ⊙ y + B (scale ⊙ A x) + bias for the tokens of each adapter.

    The base layer runs as it is, whatever its quantisation; shrink is issued first, so that it may overlap. Tensor
    parallel size 1 only: a row-parallel layer would have to add before its all-reduce.
    """

    def __init__(self, base_layer: LinearBase, site: torch.Tensor, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Plain attributes: neither buffers nor moved to the device. The id is a tensor because an int would be a
        # constant of the graph, and every layer would be compiled anew.
        self.site = site
        self.width = width

    def forward(self, x: torch.Tensor) -> Any:
        h = shrink(x, self.site, self.width)
        output = self.base_layer(x)
        y = output[0] if isinstance(output, tuple) else output
        expand(y, h, self.site, x)
        return output

    def __getattr__(self, name: str) -> Any:
        # vLLM 0.26 does not forward; code that looks for `weight` or `quant_method` on the layer must find it.
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(nn.Module.__getattr__(self, "base_layer"), name)


def find_sites(model: nn.Module) -> list[SiteSpec]:
    """Every adaptable linear of `model`, in module order, named as the checkpoint names its parts.

    vLLM fuses projections that share an input (q, k, v; gate, up): such a layer is one site with a slice per part.
    """
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    sites = []
    for name, module in model.named_modules():
        if type(module) not in ADAPTABLE:
            continue
        if getattr(module, "tp_size", 1) != 1:
            raise NotImplementedError("loramux serves tensor parallel size 1; start without --tensor-parallel-size")
        parent, _, leaf = name.rpartition(".")
        parts = tuple(f"{parent}.{part}" for part in packed.get(leaf, [leaf]))
        d_outs = _slice_widths(module)
        if len(parts) != len(d_outs):  # e.g. a checkpoint that stores the fused projection itself (Phi-3)
            parts, d_outs = (name,), (sum(d_outs),)
        sites.append(SiteSpec(name=name, modules=parts, d_in=module.input_size, d_outs=d_outs))
    return sites


def base_biases(model: nn.Module, specs: list[SiteSpec]) -> dict[str, torch.Tensor]:
    """Module -> the bias in its layer's output, [d_out] float32 on the host, where there is one.

    A layer with `skip_bias_add` hands its bias to the model, which adds it later: there is none in its output.
    """
    found: dict[str, torch.Tensor] = {}
    for spec in specs:
        layer = model.get_submodule(spec.name)
        bias = getattr(layer, "bias", None)
        if isinstance(bias, torch.Tensor) and not getattr(layer, "skip_bias_add", False):
            parts = torch.split(bias.detach().float().cpu(), list(spec.d_outs))
            found |= dict(zip(spec.modules, parts, strict=True))
    return found


def wrap(model: nn.Module, specs: list[SiteSpec], site_ids: list[torch.Tensor], widths: list[int]) -> None:
    """Put an AdaptedLinear in place of every site's layer."""
    for spec, site, width in zip(specs, site_ids, widths, strict=True):
        parent, _, leaf = spec.name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, AdaptedLinear(getattr(owner, leaf), site, width))


def _slice_widths(module: LinearBase) -> tuple[int, ...]:
    if isinstance(module, QKVParallelLinear):
        q, kv = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
        v = module.num_kv_heads * getattr(module, "v_head_size", module.head_size)
        return (q, kv, v)
    if isinstance(module, MergedColumnParallelLinear):
        return tuple(module.output_sizes)
    return (module.output_size,)
