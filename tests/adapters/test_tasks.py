"""One task out of an adapter for several; `methods/test_moelora.py` has the formula."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from loramux_adapters import Gate, LoweredAdapter, draw, open_artefact
from loramux_adapters.artefact import stored
from loramux_adapters.gate import GateKind, GateSource, Select
from loramux_adapters.native import digest_of
from loramux_adapters.prepare import keep
from loramux_adapters.tasks import at_task, task_count
from loramux_adapters.variance import VarianceKind
from loramux_adapters.verify import verify

from .checkpoints import BASE
from .natives import DOWN, Q, adapters, make_gate, make_site, same
from .posterior.posteriors import make_variance


def make_table(tasks: int = 3, default: int | None = 1, **fields: Any) -> Gate:
    return make_gate(tasks, 2, kind=GateKind.TASK, source=GateSource.NONE, task=default, **fields)


def make_adapter(**gates: Gate) -> LoweredAdapter:
    expert = torch.tensor([0, 1, 1, 1], dtype=torch.int32)
    return LoweredAdapter("x", {Q: make_site(gate="q", expert=expert), DOWN: make_site(DOWN, 3)}, gates=gates)


@pytest.mark.parametrize("task", [None, 0, 2])
def test_weights_of_the_experts_become_scales(task: int | None) -> None:
    adapter = make_adapter(q=make_table(temperature=0.5))
    one = at_task(adapter, task)
    scores = adapter.gates["q"].weights[1 if task is None else task].double() / 0.5
    g = scores.exp() / scores.exp().sum()
    torch.testing.assert_close(
        one.sites[Q].scale.double(), adapter.sites[Q].scale * g[[0, 1, 1, 1]], rtol=1e-6, atol=0.0
    )
    assert not one.gates and one.sites[DOWN] is adapter.sites[DOWN]
    assert same(replace(one.sites[Q], scale=adapter.sites[Q].scale), replace(adapter.sites[Q], gate=None, expert=None))


@pytest.mark.parametrize("kind", sorted(set(VarianceKind) - {VarianceKind.HIERARCHICAL}))  # which no gate may have
def test_a_draw_of_a_task_is_the_task_of_a_draw(kind: VarianceKind) -> None:
    adapter = make_adapter(q=make_table())
    site = adapter.sites[Q]
    site = replace(site, variance=make_variance(kind, site))
    adapter = replace(adapter, sites={**adapter.sites, Q: site})
    verify(adapter, BASE)
    for sample in (0, 3):
        found, expected = (
            one.sites[Q]
            for one in (
                draw(at_task(adapter, 2), digest="d", seed=0, sample=sample),
                at_task(draw(adapter, digest="d", seed=0, sample=sample), 2),
            )
        )
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=1e-6)
        assert same(replace(found, scale=expected.scale), expected)


def test_what_is_no_choice_of_a_task_stays() -> None:
    for gate in (make_gate(), make_table(default=None), make_table(select=Select.TOP_K, k=1)):
        adapter = make_adapter(q=gate)
        assert at_task(adapter) is adapter
    assert at_task(make_adapter(q=make_table(default=None)), 2).gates == {}
    assert task_count(make_adapter(q=make_gate())) == 0 and task_count(make_adapter(q=make_table(5))) == 5


def test_an_artefact_has_all_tasks_and_is_opened_at_one(tmp_path: Path) -> None:
    adapter = make_adapter(q=make_table())
    artefact = keep(adapter, BASE.name, tmp_path)
    assert artefact.digest == digest_of(adapter) and artefact.summary.tasks == 3
    assert same(stored(artefact.path), adapter)
    for task in (None, 0, 1, 2):
        assert same(open_artefact(artefact.path, task), at_task(adapter, task))
    assert keep(adapter, BASE.name, tmp_path) == artefact  # found intact, by all that it holds


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_a_second_time_changes_nothing(adapter: LoweredAdapter) -> None:
    one = at_task(adapter)
    assert same(at_task(one), one) and one.gates.keys() <= adapter.gates.keys()
