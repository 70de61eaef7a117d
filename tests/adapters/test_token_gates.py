"""What a gate with a map becomes for the data plane weights every rank row as the form's equations do."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.gate import Gate, GateValue, Norm, PreMap, Select
from loramux_adapters.token_gates import router_rows, row_owners, token_gate
from loramux_kernels import MAX_EXPERTS
from loramux_kernels.cpu.gate import gate as kernel_gate
from loramux_kernels.cpu.gate import normalised

from .form import gate_values
from .natives import Q, make_site


@settings(max_examples=40, deadline=None)
@given(data=st.data(), experts=st.integers(1, 16), seed=st.integers(0, 1000))
def test_rows_are_weighted_alike(data: st.DataObject, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = data.draw(st.lists(st.integers(0, 3), min_size=experts, max_size=experts))
    numbers = list(dict.fromkeys(groups))
    adaptive = experts < 16 and data.draw(st.booleans())
    gate = Gate(
        torch.randn(experts, 24, generator=generator),
        select=Select.ADAPTIVE if adaptive else Select.TOP_K,
        k=None if adaptive else data.draw(st.integers(1, experts)),
        adaptive_weight=torch.randn(24, generator=generator) if adaptive else None,
        adaptive_bias=torch.randn(1, generator=generator).bfloat16() if adaptive else None,
        tau_max=data.draw(st.floats(0.01, 1.0)) if adaptive else None,
        norm=data.draw(st.sampled_from([Norm.RENORM, Norm.SOFTMAX])),
        value=data.draw(st.sampled_from(GateValue)),
        pre=data.draw(st.sampled_from([PreMap.NONE, PreMap.LAYER_NORM])),
        expert_map=torch.tensor([numbers.index(group) for group in groups], dtype=torch.int32),
    )
    rows = st.lists(st.integers(0, gate.weights_given - 1), min_size=1, max_size=MAX_EXPERTS)
    expert = data.draw(st.none() | rows)
    rank = 3 if expert is None else len(expert)
    site = make_site(Q, rank, gate="q", expert=None if expert is None else torch.tensor(expert, dtype=torch.int32))
    x = torch.randn(5, 24, generator=generator).double()
    rule, router = token_gate(gate, site), router_rows(gate).double()
    logits = x @ router.T
    if rule.layer_norm_eps is not None:
        moments = torch.stack([x.mean(1), x.var(1, correction=0)], 1)
        logits = normalised(rule, logits, moments, router.sum(1))
    found = kernel_gate(rule, logits)[:, row_owners(gate, site).long()]
    wanted = gate_values(gate, x)[:, [0] * rank if expert is None else expert]
    # Where a threshold is taken off, digits are lost.
    torch.testing.assert_close(found, wanted, rtol=1e-9 if adaptive else 1e-12, atol=1e-15)
