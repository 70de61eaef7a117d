"""Which linears of a model are sites, and what a wrapped one computes; without vLLM's distributed start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from loramux.engine.wrappers import AdaptedLinear, base_biases, find_sites, wrap
from loramux_kernels import AdapterPool


def bare(kind: type, d_in: int, d_out: int, **more: Any) -> Any:
    """A vLLM linear as a model holds it, made without its process groups."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.weight = nn.Parameter(torch.randn(d_out, d_in), requires_grad=False)
    for name, value in {"input_size": d_in, "output_size": d_out, "tp_size": 1, **more}.items():
        setattr(layer, name, value)
    layer.forward = lambda x: (x @ layer.weight.T, None)
    return layer


class Strange(ReplicatedLinear):  # type: ignore[misc]
    """Computes who knows what from its weight."""


class Model(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        layer = self.layers[0]
        layer.qkv_proj = bare(QKVParallelLinear, 8, 16, num_heads=4, num_kv_heads=2, head_size=2)
        layer.gate_up_proj = bare(MergedColumnParallelLinear, 8, 20, output_sizes=[10, 10])
        layer.down_proj = bare(RowParallelLinear, 10, 8, **more)
        layer.strange = bare(Strange, 8, 8)
        layer.norm = nn.Linear(8, 8)


def test_every_exact_linear_is_a_site_with_a_slice_per_part() -> None:
    sites = {site.name: site for site in find_sites(Model())}
    assert list(sites) == ["layers.0.qkv_proj", "layers.0.gate_up_proj", "layers.0.down_proj"]
    qkv = sites["layers.0.qkv_proj"]
    assert qkv.modules == tuple(f"layers.0.{part}_proj" for part in "qkv")
    assert (qkv.d_in, qkv.d_outs) == (8, (8, 4, 4))
    assert sites["layers.0.gate_up_proj"].d_outs == (10, 10)
    assert (sites["layers.0.down_proj"].d_in, sites["layers.0.down_proj"].d_outs) == (10, (8,))


def test_a_projection_the_checkpoint_stores_fused_is_one_part() -> None:
    model = Model()
    model.packed_modules_mapping = {}
    sites = {site.name: site for site in find_sites(model)}
    assert sites["layers.0.qkv_proj"].modules == ("layers.0.qkv_proj",)
    assert sites["layers.0.qkv_proj"].d_outs == (16,)


def test_a_split_layer_is_refused() -> None:
    with pytest.raises(NotImplementedError):
        find_sites(Model(tp_size=2))


def test_wrapped_layers_add_the_adapter_and_leave_base_rows_bit_for_bit() -> None:
    model = Model()
    layer = model.layers[0].qkv_proj
    specs = find_sites(model)
    pool = AdapterPool(
        specs,
        capacity_bytes=2**16,
        slots=2,
        max_rank=16,
        max_tokens=8,
        max_requests=4,
        dtype=torch.float32,
        device="cpu",
    )
    wrap(model, specs, pool.site_ids, [pool.h_width(i) for i in range(len(specs))])
    wrapped: Any = model.layers[0].qkv_proj
    assert isinstance(wrapped, AdaptedLinear)
    assert wrapped.base_layer is layer
    assert wrapped.weight is layer.weight  # what others look for on the layer is found
    assert not hasattr(wrapped, "no_such_attribute")

    module = "layers.0.k_proj"
    a, b, scale = torch.randn(3, 8), torch.randn(3, 4), torch.rand(3)
    slot = pool.reserve({module: 3})
    pool.write(slot, module, a, b, scale)
    pool.publish(slot)
    pool.set_batch(np.array([-1, slot], np.int32), np.array([2, 3], np.int32))
    x = torch.randn(5, 8)
    base, (y, bias) = layer(x)[0], wrapped(x)
    assert bias is None
    assert torch.equal(y[:2], base[:2])
    expected = base[2:].clone()
    expected[:, 8:12] += (x[2:] @ a.T * scale) @ b
    torch.testing.assert_close(y[2:], expected)
    pool.set_idle(False)
    assert torch.equal(wrapped(x)[0], base)


def test_biases_that_are_in_a_layers_output_by_module() -> None:
    """Not those that the layer hands to the model, which adds them later."""
    model = Model()
    layer = model.layers[0]
    layer.qkv_proj.bias = nn.Parameter(torch.arange(16.0))
    layer.gate_up_proj.bias, layer.gate_up_proj.skip_bias_add = nn.Parameter(torch.ones(20)), True
    layer.down_proj.bias = None
    found = base_biases(model, find_sites(model))
    assert {module: bias.tolist() for module, bias in found.items()} == {
        "layers.0.q_proj": list(range(8)), "layers.0.k_proj": [8, 9, 10, 11], "layers.0.v_proj": [12, 13, 14, 15]
    }  # fmt: skip
    assert not any(bias.requires_grad for bias in found.values())
