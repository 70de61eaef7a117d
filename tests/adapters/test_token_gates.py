"""What a gate with a map becomes for the data plane weights every rank row as the form's equations do."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.gate import Gate, GateValue, Norm, Select
from loramux_adapters.token_gates import row_owners, token_gate
from loramux_kernels import MAX_EXPERTS
from loramux_kernels.cpu.gate import gate as kernel_gate

from .form import gate_values
from .natives import Q, make_site


@settings(max_examples=40, deadline=None)
@given(data=st.data(), experts=st.integers(1, 16), seed=st.integers(0, 1000))
def test_rows_are_weighted_alike(data: st.DataObject, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = data.draw(st.lists(st.integers(0, 3), min_size=experts, max_size=experts))
    numbers = list(dict.fromkeys(groups))
    gate = Gate(
        torch.randn(experts, 24, generator=generator),
        select=Select.TOP_K,
        k=data.draw(st.integers(1, experts)),
        norm=data.draw(st.sampled_from([Norm.RENORM, Norm.SOFTMAX])),
        value=data.draw(st.sampled_from(GateValue)),
        expert_map=torch.tensor([numbers.index(group) for group in groups], dtype=torch.int32),
    )
    rows = st.lists(st.integers(0, gate.weights_given - 1), min_size=1, max_size=MAX_EXPERTS)
    expert = data.draw(st.none() | rows)
    rank = 3 if expert is None else len(expert)
    site = make_site(Q, rank, gate="q", expert=None if expert is None else torch.tensor(expert, dtype=torch.int32))
    x = torch.randn(5, 24, generator=generator).double()
    found = kernel_gate(token_gate(gate, site), x @ gate.weights.double().T)[:, row_owners(gate, site).long()]
    wanted = gate_values(gate, x)[:, [0] * rank if expert is None else expert]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
