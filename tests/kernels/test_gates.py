"""The gate alone: both host implementations against a float64 one by sorting, and its corner cases by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loramux_kernels import MAX_EXPERTS, TokenGate
from loramux_kernels.cpu import gate as cpu_gate
from loramux_kernels.gates import Select
from loramux_kernels.reference import gate as reference_gate
from loramux_kernels.testing import MARGIN, TOLERANCE, exact_gates, gate_error, rounded_scores


def by_token(rule: TokenGate, logits: Tensor) -> Tensor:
    return torch.stack([reference_gate.gate(rule, row) for row in logits])


BACKENDS: dict[str, Callable[[TokenGate, Tensor], Tensor]] = {"cpu": cpu_gate.gate, "reference": by_token}
SELECTIONS = get_args(Select)
RULES = st.builds(
    TokenGate,
    experts=st.integers(1, MAX_EXPERTS - 1),
    select=st.sampled_from(SELECTIONS),
    k=st.integers(1, MAX_EXPERTS + 2),
    p=st.floats(0.05, 0.95),
    threshold=st.floats(0.0, 0.7),
    bias=st.floats(-3.0, 3.0),
    renormalise=st.booleans(),
    eps=st.sampled_from([0.0, 1e-6, 0.5]),
    temperature=st.floats(0.3, 4.0),
    absolute=st.booleans(),
    one=st.booleans(),
)
RULES |= RULES.filter(lambda rule: not rule.adaptive).map(lambda rule: replace(rule, experts=MAX_EXPERTS))


@st.composite
def grouped(draw: st.DrawFn) -> TokenGate:
    """Any sets of experts: disjoint, overlapping, equal, and experts in none."""
    rule = draw(RULES)
    return replace(rule, groups=tuple(draw(st.lists(st.integers(1, (1 << rule.experts) - 1), max_size=MAX_EXPERTS))))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(rule=RULES | grouped(), seed=st.integers(0, 2**31))
def test_against_sorting_in_float64(backend: str, rule: TokenGate, seed: int) -> None:
    logits = torch.randn(24, rule.logits, generator=torch.Generator().manual_seed(seed))
    want = exact_gates(rule, logits.double())
    # Where a selection hangs on a rounding, float32 and float64 may differ; most tokens are far from that.
    clear = want.margin > MARGIN
    # A difference of probabilities that is just above MARGIN has lost four of its sixteen digits.
    exactly = BACKENDS[backend](rule, logits.double())
    torch.testing.assert_close(exactly[clear], want.g[clear], rtol=1e-11 if rule.adaptive else 1e-12, atol=0)
    got = BACKENDS[backend](rule, logits)
    assert got.dtype == torch.float32
    error = (got.double() - want.g).abs()
    exact = logits.double()
    assert (error <= gate_error(rule, exact, rounded_scores(rule, exact), TOLERANCE[torch.float32]))[clear].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rule", "scores", "want"),
    [
        # Between equal scores the lower index comes first.
        (TokenGate(4, "top_k", k=2), [0, 0, 0, 0], [0.5, 0.5, 0, 0]),
        (TokenGate(4, "top_k", k=2), [0, 3, 0, 3], [0, 0.5, 0, 0.5]),
        (TokenGate(3, "top_k", k=1, absolute=True), [1, -2, 2], [0, 1, 0]),
        (TokenGate(4, "top_p", p=0.5), [0, 0, 0, 0], [0.5, 0.5, 0, 0]),
        (TokenGate(4, "top_p", p=0.51), [0, 0, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]),
        # The one that reaches p is in, and so is the first, however small p is.
        (TokenGate(2, "top_p", p=1e-6, renormalise=False), [0, 0], [0.5, 0]),
        (TokenGate(4, "top_p", p=1.0), [0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]),
        (TokenGate(4, "threshold", threshold=0.25, renormalise=False), [0, 0, 0, 0], [0.25] * 4),
        (TokenGate(10, "threshold", threshold=0.1, renormalise=False), [0] * 10, [0.1] * 10),
        (TokenGate(4, "threshold", threshold=0.26), [0, 0, 0, 0], [0, 0, 0, 0]),
        (TokenGate(4, "threshold", threshold=2.0, one=True), [0, 0, 0, 9], [0, 0, 0, 0]),
        # τ is 1/4, 1/2, 0, 1/4 just reached, 1 and 1/4: the last score is the threshold's, its own bias comes to that.
        (TokenGate(2, "adaptive", threshold=0.5, renormalise=False), [math.log(3), 0, 0], [0.5, 0]),
        (TokenGate(3, "adaptive", threshold=1.0), [math.log(6), math.log(2), 0, 0], [1, 0, 0]),
        (TokenGate(2, "adaptive", threshold=0.5), [0, math.log(3), -200], [0.25, 0.75]),
        (TokenGate(4, "adaptive", threshold=0.5), [0, 0, 0, 0, 0], [0, 0, 0, 0]),
        (TokenGate(2, "adaptive", threshold=1.0, bias=200), [3, 0, 0], [0, 0]),
        (TokenGate(2, "adaptive", threshold=1.0, bias=-1, eps=0.5), [math.log(3), 0, 1 - math.log(3)], [0.5, 0]),
        # |·| and the temperature are the experts' only; groups sum what is left.
        (TokenGate(2, "adaptive", threshold=1.0, absolute=True, renormalise=False), [-0.0, 0, -200], [0.5, 0.5]),
        (TokenGate(2, "adaptive", threshold=0.5, temperature=1e9, renormalise=False), [9, 0, 0], [0.25, 0.25]),
        (TokenGate(2, "adaptive", threshold=0.5, one=True, groups=(0b11, 0b01)), [math.log(7), 0, 0], [1, 1]),
        (TokenGate(3, "top_k", k=9, one=True), [5, 0, 1], [1, 1, 1]),
        (TokenGate(2, "top_k", k=1, eps=0.5), [0, 0], [0.5, 0]),
        (TokenGate(1, "top_k", k=1), [-7], [1]),
        (TokenGate(2, temperature=0.5), [math.log(3) / 2, 0], [0.75, 0.25]),
        # Experts 0 and 2 share rows; 3 has some of its own beside those of all four.
        (TokenGate(4, groups=(0b0101, 0b0010, 0b1111, 0b1000)), [0, 0, 0, 0], [0.5, 0.25, 1, 0.25]),
        (TokenGate(4, "top_k", k=2, one=True, groups=(0b0101, 0b1010)), [3, 0, 3, 0], [2, 0]),
        (TokenGate(16, "top_k", k=1, groups=tuple(1 << e for e in range(16))), [0] * 15 + [1], [0] * 15 + [1]),
    ],
    ids=str,
)
def test_by_hand(backend: str, rule: TokenGate, scores: list[float], want: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        got = BACKENDS[backend](rule, torch.tensor([scores, scores], dtype=dtype))
        torch.testing.assert_close(got, torch.tensor([want, want], dtype=dtype))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("experts", {"experts": 0}),
        ("experts", {"experts": MAX_EXPERTS + 1}),
        ("experts", {"experts": MAX_EXPERTS, "select": "adaptive"}),
        ("select", {"select": "best"}),
        ("k", {"select": "top_k"}),
        ("k", {"k": -1}),
        ("p", {"p": 0.0}),
        ("p", {"p": 1.5}),
        ("threshold", {"threshold": math.nan}),
        ("bias", {"bias": 1e39}),
        ("eps", {"eps": -1e-6}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": 1e-60}),
        ("temperature", {"temperature": 1e60}),
        ("layer_norm_eps", {"layer_norm_eps": 0.0}),
        ("layer_norm_eps", {"layer_norm_eps": 1e-60}),
        ("groups", {"groups": (0,)}),
        ("groups", {"groups": (1, 0b10000)}),
        ("groups", {"groups": (-1,)}),
        ("groups", {"groups": (1,) * (MAX_EXPERTS + 1)}),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        TokenGate(**{"experts": 4, **values})
