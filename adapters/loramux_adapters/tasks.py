"""One task out of an adapter for several: the weights of its experts become scales.

    g = softmax(scores[task] / T)        scale'[j] = scale[j] · g[expert[j]]

A table's gate asks no token, so what is left is a plain site: exact, with one rounding of the scale to float32. Of a
Bayesian adapter a posterior's scales and their standard deviations are weighted alike: its draws are those of the task.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from loramux_adapters.gate import Gate, GateKind, GateValue, Norm, PostMap, Select
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.variance import SCALES


def at_task(adapter: LoweredAdapter, task: int | None = None) -> LoweredAdapter:
    """The adapter of one task: `task`, one of its `task_count`, or the default of each table.

    Tables that have none when no task is given stay, and so do those that are not a softmax of their scores; an adapter
    without tables is returned as it is.
    """
    tables = {
        name: gate
        for name, gate in adapter.gates.items()
        if gate.kind is GateKind.TASK
        and (task is not None or gate.task is not None)
        and not any(unserved_in_table(gate))
    }
    if not tables:
        return adapter
    sites = {
        module: site if site.gate not in tables else _weighted(site, tables[site.gate], task)
        for module, site in adapter.sites.items()
    }
    gates = {name: gate for name, gate in adapter.gates.items() if name not in tables}
    return replace(adapter, sites=sites, gates=gates)


def task_count(adapter: LoweredAdapter) -> int:
    """How many tasks a request may choose from; 0 for an adapter without tables."""
    return min((gate.tasks for gate in adapter.gates.values() if gate.kind is GateKind.TASK), default=0)


def unserved_in_table(gate: Gate) -> Iterator[tuple[str, str]]:
    """What makes a table more than a softmax of a task's scores: the field and why it is not run."""
    for field, served in (
        ("select", (Select.ALL,)),
        ("post", (PostMap.NONE,)),
        ("norm", (Norm.SOFTMAX, Norm.RENORM)),  # over all experts they are the same
        ("eps", (0.0,)),
        ("value", (GateValue.PROBABILITY,)),
    ):
        if (value := getattr(gate, field)) not in served:
            yield field, f"{value} is not run yet for a task table"
    for field in ("expert_map", "capacity"):
        if getattr(gate, field) is not None:
            yield field, "is not run yet for a task table"


def _weighted(site: LoweredSite, gate: Gate, task: int | None) -> LoweredSite:
    scores = gate.weights[gate.task if task is None else task].double()
    g = torch.softmax(scores / gate.temperature, 0)
    expert = torch.zeros(site.rank, dtype=torch.long) if site.expert is None else site.expert.long()
    weights = g[expert]

    def weighted(scale: torch.Tensor) -> torch.Tensor:
        return (scale.double() * weights).float()

    variance = site.variance
    if variance is not None:
        scales = {name: weighted(variance.tensors[name]) for name in SCALES if name in variance.tensors}
        variance = replace(variance, tensors={**variance.tensors, **scales})
    return replace(site, scale=weighted(site.scale), gate=None, expert=None, variance=variance)
