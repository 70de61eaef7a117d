"""What the data plane can run today. The form can express more: that is kept, loaded, and refused when it is served.

Of a Bayesian adapter it runs the mean, and draws that were made plain adapters of their own (`posterior/`).
"""

from collections.abc import Iterator

from loramux_adapters.errors import AdapterUnsupportedFeature, shown
from loramux_adapters.gate import Gate, GateKind, GateSource, GateValue, Norm, PostMap, PreMap, Select
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.tasks import unserved_in_table
from loramux_adapters.token_gates import used_weights
from loramux_kernels import MAX_EXPERTS

_NORMS = (Norm.SOFTMAX, Norm.RENORM)


def unserved(adapter: LoweredAdapter) -> list[str]:
    """Every field that keeps the adapter from being served, as "field: reason"; [] if it can be."""
    return [f"{field}: {reason}" for field, reason in _obstacles(adapter)]


def check_servable(adapter: LoweredAdapter) -> None:
    """Raises AdapterUnsupportedFeature naming the first field that the data plane cannot run yet."""
    for field, reason in _obstacles(adapter):
        raise AdapterUnsupportedFeature(
            f"{shown(field)}: {reason}.",
            hint="The adapter is sound, but this cannot be served yet.",
            field=field,
        )


def _obstacles(adapter: LoweredAdapter) -> Iterator[tuple[str, str]]:
    for layer in sorted(adapter.ffn):
        yield f"ffn.{layer}", "mixtures of whole feed-forward blocks are not run yet"
    for name, gate in sorted(adapter.gates.items()):
        for field, reason in _gate_obstacles(gate):
            yield f"gates.{name}.{field}", reason
    for module, site in sorted(adapter.sites.items()):
        if site.magnitude is not None and site.magnitude.ndim != 1:
            yield f"sites.{module}.magnitude", "one for each expert is not run yet"
        if site.carry is not None:
            yield f"sites.{module}.carry", "is not run yet"
        if site.gate is None or (gate := adapter.gates[site.gate]).kind is GateKind.TASK:
            continue
        if (count := len(used_weights(gate, site))) > MAX_EXPERTS:
            yield f"sites.{module}.expert", f"{count} groups and single experts are more than {MAX_EXPERTS}"


def _gate_obstacles(gate: Gate) -> Iterator[tuple[str, str]]:
    if gate.kind is GateKind.TASK:
        yield from _table_obstacles(gate)
        return
    for field, served in (
        ("kind", (GateKind.TOKEN,)),
        ("source", (GateSource.SITE_INPUT,)),
        ("pre", (PreMap.NONE, PreMap.LAYER_NORM)),
        ("post", (PostMap.NONE, PostMap.ABS)),
        ("norm", _NORMS),
        ("value", (GateValue.PROBABILITY, GateValue.ONE)),
    ):
        if (value := getattr(gate, field)) not in served:
            yield field, f"{value} is not run yet"
    for field, present in (
        ("bias", gate.bias is not None),
        ("hidden", bool(gate.hidden)),
    ):
        if present:
            yield field, "is not run yet"
    most = MAX_EXPERTS - (gate.select is Select.ADAPTIVE)
    if gate.scored > most:
        yield "weights", f"{gate.scored} experts are more than {most}"


def _table_obstacles(gate: Gate) -> Iterator[tuple[str, str]]:
    """A task's weights become scales (`tasks.py`), but somebody has to say which task."""
    if gate.task is None:
        last = gate.tasks - 1
        yield "task", f'which task? Say whose answers are the default as "task_id", 0 to {last}, in adapter_config.json'
    yield from unserved_in_table(gate)
