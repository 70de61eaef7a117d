"""Checks of one site: shapes that agree with each other, indices in range, a posterior and a carry that make sense."""

import torch

from loramux_adapters.errors import (
    AdapterConfigInvalid,
    AdapterError,
    AdapterShapeMismatch,
    shown,
)
from loramux_adapters.gate import Gate
from loramux_adapters.lowered import Carry, CarryKind, LoweredAdapter, LoweredSite
from loramux_adapters.variance import SHAPES, STANDARD_DEVIATIONS, Variance, VarianceForm, VarianceKind
from loramux_kernels import blocks_of


def check_site(module: str, site: LoweredSite) -> None:
    """Shapes agree within the site, and the posterior's fields with its kind; no tensor's values are read."""
    if not _is_outputs_only(site):
        for name, factor in (("A", site.a), ("B", site.b)):
            if factor.ndim != 2 or 0 in factor.shape:
                raise _mismatch(f"{module}.{name}", factor, "two axes, none of them empty")
    rank, d_out = site.b.shape
    expected: dict[str, tuple[int, ...]] = {"scale": (rank,), "expert": (rank,), "arow": (rank,), "bias": (d_out,)}
    if site.arow is None:
        expected["A"] = (rank, site.a.shape[1])
    for part, tensor in site.tensors().items():
        if part in expected and tuple(tensor.shape) != expected[part]:
            raise _mismatch(f"{module}.{part}", tensor, str(expected[part]))
    magnitude = site.magnitude
    if magnitude is not None and (magnitude.ndim not in (1, 2) or magnitude.shape[-1] != d_out or 0 in magnitude.shape):
        raise _mismatch(f"{module}.magnitude", magnitude, f"({d_out},) or (experts, {d_out})")
    if site.gate is None and site.expert is not None:
        raise _invalid(f"{module}.expert", "names experts without a gate", "Name the gate, or leave expert out.")
    if site.variance is not None:
        _check_variance(module, site, site.variance)
    if site.bands != 1:
        _check_bands(module, site)


def _is_outputs_only(site: LoweredSite) -> bool:
    """No rank at all, which a site with a magnitude or a bias may have; then it has nothing that ranks have."""
    ranked = (site.gate, site.carry, site.variance, site.arow)
    return (
        (site.magnitude is not None or site.bias is not None)
        and all(part is None for part in ranked)
        and all(factor.ndim == 2 and factor.shape[0] == 0 and factor.shape[1] for factor in (site.a, site.b))
    )


def check_experts(module: str, site: LoweredSite, gate: Gate | None) -> None:
    """Expert ids are the gate's, rows lie below R_a, and every row of A is read."""
    experts = 1 if gate is None else gate.experts
    if site.expert is not None:
        _check_range(f"{module}.expert", site.expert, 1 if gate is None else gate.weights_given)
    if site.magnitude is not None and site.magnitude.ndim == 2 and site.magnitude.shape[0] != experts:
        raise _mismatch(f"{module}.magnitude", site.magnitude, f"one row for each of {experts} experts")
    if site.arow is not None:
        rows = site.a.shape[0]
        _check_range(f"{module}.arow", site.arow, rows)
        if len(torch.unique(site.arow)) != rows:
            raise _invalid(f"{module}.arow", "leaves rows of A unread", "Remove those rows.")


def check_deviations(module: str, variance: Variance) -> None:
    """No standard deviation is negative."""
    for name in STANDARD_DEVIATIONS:
        sigma = variance.tensors.get(name)
        if sigma is not None and bool((sigma < 0).any()):
            raise _invalid(
                f"{module}.variance.{name}",
                f"holds {float(sigma.min()):g}",
                "Standard deviations are 0 or above: store them, not what training made them from.",
            )


def check_zeros(module: str, site: LoweredSite) -> None:
    """Outside of its bands a block-diagonal site is zero."""
    for name, factor in (("A", site.a), ("B", site.b)):
        if site.bands > 1 and factor.shape[0] and blocks_of(factor, site.bands) is None:
            raise _invalid(f"{module}.{name}", f"is not zero outside of {site.bands} bands", "Leave bands out.")


def check_carry(module: str, carry: Carry, adapter: LoweredAdapter) -> None:
    """The chain of sources exists, is as long as `depth`, never returns, and has the widths that are added."""
    field = f"sites.{module}.carry"
    if carry.depth < 1 or (carry.kind is CarryKind.AHEAD_ROWS and carry.depth != 1):
        raise _invalid(f"{field}.depth", f"is {carry.depth}", "It is 1 or, for prev_u, more.")
    site, source, seen = adapter.sites[module], carry.source, {module}
    for _ in range(carry.depth):
        if source in seen or source not in adapter.sites:
            why = "returns to where it was" if source in seen else "is no site of the adapter"
            raise _invalid(f"{field}.source", f"{shown(source)} {why}", "Name an earlier site, or lower the depth.")
        seen.add(source)
        other = adapter.sites[source]
        axis = 0 if carry.kind is CarryKind.PREV_U else 1
        if other.a.shape[axis] != site.a.shape[axis]:
            raise _mismatch(f"{source}.A", other.a, f"{site.a.shape[axis]} long on axis {axis}, like {shown(module)}")
        source = other.carry.source if other.carry is not None else ""


def _check_variance(module: str, site: LoweredSite, variance: Variance) -> None:
    shapes = SHAPES[variance.kind]
    field = f"sites.{module}.variance"
    if set(variance.tensors) != set(shapes):
        needs = ", ".join(shapes) or "no tensors"
        raise _invalid(f"{field}.kind", f"is {variance.kind}, which needs {needs}", "Give just those.")
    if (variance.kind is VarianceKind.DROPOUT) != (variance.rate is not None):
        raise _invalid(f"{field}.rate", "belongs to dropout, and dropout needs it", "Give it there only.")
    if variance.rate is not None and not 0 < variance.rate < 1:
        raise _invalid(f"{field}.rate", f"is {variance.rate}", "It is a probability above 0 and below 1.")
    if variance.form is not VarianceForm.LINEAR and variance.kind is not VarianceKind.HIERARCHICAL:
        raise _invalid(f"{field}.form", "belongs to hierarchical", "Store standard deviations.")
    if variance.kind is VarianceKind.HIERARCHICAL and (site.gate, site.carry) != (None, None):
        raise _invalid(f"{field}.kind", "is of one ΔW, but the site has a gate or a carry", "Leave one of them out.")
    axes = {"Ra": site.a.shape[0], "I": site.a.shape[1], "R": site.b.shape[0], "O": site.b.shape[1], "1": 1}
    for name, letters in shapes.items():
        tensor = variance.tensors[name]
        if tensor.ndim == len(letters) and 0 not in tensor.shape:
            for letter, length in zip(letters, tensor.shape, strict=True):
                axes.setdefault(letter, length)
        expected = tuple(axes.get(letter, 1) for letter in letters)
        if tuple(tensor.shape) != expected:
            raise _mismatch(f"{module}.variance.{name}", tensor, f"{expected} ({', '.join(letters)})")


def _check_bands(module: str, site: LoweredSite) -> None:
    field = f"sites.{module}.bands"
    if site.bands < 1 or any(size % site.bands for size in (*site.a.shape, *site.b.shape)):
        sizes = f"rank {site.rank}, {site.a.shape[1]} inputs and {site.b.shape[1]} outputs"
        raise _invalid(field, f"is {site.bands}, which does not divide {sizes}", "Leave it out, or correct it.")
    if (site.gate, site.arow, site.carry, site.variance) != (None,) * 4:
        raise _invalid(field, "stands beside a gate, arow, a carry or a posterior", "Leave one of them out.")


def _check_range(field: str, index: torch.Tensor, limit: int) -> None:
    low, high = (int(extreme) for extreme in torch.aminmax(index))
    if low < 0 or high >= limit:
        raise _invalid(field, f"holds {low if low < 0 else high}, not 0 to {limit - 1}", "Correct the indices.")


def _invalid(field: str, what: str, hint: str) -> AdapterError:
    return AdapterConfigInvalid(f"{shown(field)} {what}.", hint=hint, field=field)


def _mismatch(field: str, tensor: torch.Tensor, rule: str) -> AdapterError:
    return AdapterShapeMismatch(
        f"{shown(field)} has shape {tuple(tensor.shape)}, not {rule}.",
        hint="A is [rows, d_in], B is [rank, d_out] (transposed), the others follow from them.",
        field=field,
    )
