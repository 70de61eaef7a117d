"""Checks of one gate: its fields fit each other, its tensors have the shapes they must have, its numbers make sense."""

import math
from collections.abc import Iterator, Mapping

import torch

from loramux_adapters.errors import AdapterConfigInvalid, AdapterError, AdapterShapeMismatch, shown
from loramux_adapters.gate import Gate, GateKind, GateSource, Norm, Pooling, PreMap, Select

# Numerator and denominator of PreMap.RATIONAL.
RATIONAL_COEFFICIENTS = 12

_SOURCES: Mapping[GateKind, frozenset[GateSource]] = {
    GateKind.TOKEN: frozenset({GateSource.SITE_INPUT, GateSource.FFN_INPUT}),
    GateKind.PROMPT: frozenset({GateSource.LAYER_INPUT}),
    GateKind.TASK: frozenset({GateSource.NONE}),
    GateKind.TWO_PASS: frozenset({GateSource.BASE_HIDDEN}),
}


def check_gate(name: str, gate: Gate) -> None:
    """Everything but the numbers inside tensors. Raises AdapterConfigInvalid or AdapterShapeMismatch."""
    _check_shapes(name, gate)
    for field, rule in _broken_rules(gate):
        raise AdapterConfigInvalid(
            f"{shown(f'gates.{name}.{field}')} {rule}.", hint="Correct the gate.", field=f"gates.{name}.{field}"
        )


def check_expert_map(name: str, gate: Gate) -> None:
    """Groups are numbered in the order of their first expert. Raises AdapterConfigInvalid."""
    if gate.expert_map is None:
        return
    groups = 0
    for group in gate.expert_map.tolist():
        if not 0 <= group <= groups:
            raise AdapterConfigInvalid(
                f"{shown(f'gates.{name}.expert_map')} sends an expert to {group}, not to 0…{groups}.",
                hint="Number the groups 0, 1, 2, … in the order of their first expert.",
                field=f"gates.{name}.expert_map",
            )
        groups = max(groups, group + 1)


def _float32(value: float) -> float:
    """The number as gates compute with it."""
    return float(torch.tensor(value, dtype=torch.float32))


def _broken_rules(gate: Gate) -> Iterator[tuple[str, str]]:
    yield from _misplaced(gate)
    if gate.source not in _SOURCES[gate.kind]:
        yield "source", f"is {gate.source}, which a gate of kind {gate.kind} does not read"
    if gate.k is not None and not 1 <= gate.k <= gate.scored:
        yield "k", f"is {gate.k}, not 1 to {gate.scored} (the number of experts)"
    if gate.p is not None and not 0 < _float32(gate.p) <= 1:
        yield "p", f"is {gate.p}, not above 0 and at most 1"
    if gate.threshold is not None and not math.isfinite(_float32(gate.threshold)):
        yield "threshold", f"is {gate.threshold}, not finite"
    if gate.tau_max is not None and not 0 < _float32(gate.tau_max) < math.inf:
        yield "tau_max", f"is {gate.tau_max}, not positive and finite"
    if not 0 < _float32(gate.temperature) < math.inf:
        yield "temperature", f"is {gate.temperature}, not positive and finite"
    if not 0 <= _float32(gate.eps) < math.inf:
        yield "eps", f"is {gate.eps}, not finite and at least 0"
    if not 0 < _float32(gate.pre_eps) < math.inf:
        yield "pre_eps", f"is {gate.pre_eps}, not positive and finite"
    if gate.task is not None and gate.kind is GateKind.TASK and not 0 <= gate.task < gate.tasks:
        yield "task", f"is {gate.task}, not 0 to {gate.tasks - 1}"
    if gate.capacity is not None and not 1 <= gate.capacity.tokens < 1 << 31:
        yield "capacity.tokens", f"is {gate.capacity.tokens}, not at least 1 and below 2^31"


def _misplaced(gate: Gate) -> Iterator[tuple[str, str]]:
    """Fields that belong to a choice: needed with it, without meaning otherwise."""
    table = gate.kind is GateKind.TASK
    belongs = {
        "k": gate.select is Select.TOP_K,
        "p": gate.select is Select.TOP_P,
        "threshold": gate.select is Select.THRESHOLD,
        "adaptive_weight": gate.select is Select.ADAPTIVE,
        "adaptive_bias": gate.select is Select.ADAPTIVE,
        "tau_max": gate.select is Select.ADAPTIVE,
        "rational": gate.pre is PreMap.RATIONAL,
        "pool": gate.source is GateSource.LAYER_INPUT,
        "pool_weight": gate.pool is Pooling.ATTENTION,
    }
    for field, needed in belongs.items():
        present = getattr(gate, field) is not None
        if needed and not present:
            yield field, "is missing"
        if present and not needed:
            yield field, "has no meaning in this gate"
    for field, used, allowed in (
        ("eps", gate.eps != 0, gate.norm is Norm.RENORM),
        ("task", gate.task is not None, table),
        ("bias", gate.bias is not None, not table),
        ("hidden", bool(gate.hidden), not table),
        ("pre", gate.pre is not PreMap.NONE, not table),
        ("select", gate.select is Select.ADAPTIVE, not table),
    ):
        if used and not allowed:
            yield field, "has no meaning in this gate"


def _check_shapes(name: str, gate: Gate) -> None:
    if gate.weights.ndim != 2 or 0 in gate.weights.shape:
        raise _mismatch(name, "weights", gate.weights, "two axes, none of them empty")
    width = gate.width
    expected: dict[str, tuple[int, ...]] = {
        "bias": (gate.scored,),
        "expert_map": (gate.scored,),
        "rational": (RATIONAL_COEFFICIENTS,),
        "adaptive_bias": (1,),
    }
    if width is not None:
        expected |= {"pool_weight": (width,), "adaptive_weight": (width,)}
        for i, (weight, _) in enumerate(gate.hidden):
            if weight.ndim != 2 or 0 in weight.shape or weight.shape[1] != width:
                raise _mismatch(name, f"hidden.{i}.weight", weight, f"two axes, the second of length {width}")
            width = weight.shape[0]
            expected[f"hidden.{i}.bias"] = (width,)
        expected["weights"] = (gate.scored, width)
    for part, tensor in gate.tensors().items():
        if part in expected and tuple(tensor.shape) != expected[part]:
            raise _mismatch(name, part, tensor, str(expected[part]))


def _mismatch(name: str, part: str, tensor: torch.Tensor, rule: str) -> AdapterError:
    field = f"gate:{name}.{part}"
    return AdapterShapeMismatch(
        f"{shown(field)} has shape {tuple(tensor.shape)}, not {rule}.",
        hint="A router is [experts, width of what it reads], as torch.nn.Linear stores it.",
        field=field,
    )
