"""Checks that every method's result must pass before it is served."""

import math

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import (
    AdapterConfigInvalid,
    AdapterError,
    AdapterNoEffect,
    AdapterNotFinite,
    AdapterShapeMismatch,
    AdapterUnknownTensor,
    AdapterUnsupportedFeature,
    AdapterWrongBase,
    shown,
)
from loramux_adapters.gate import GateSource
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.verify_gate import check_expert_map, check_gate
from loramux_adapters.verify_site import check_carry, check_deviations, check_experts, check_site, check_zeros


def verify(adapter: LoweredAdapter, base: BaseModel) -> None:
    """Everything fits together and the base, every number is finite, and something changes. Raises AdapterError."""
    check_form(adapter)
    check_base(adapter, base)
    check_values(adapter)


def check_form(adapter: LoweredAdapter) -> None:
    """Shapes and fields agree with each other. Reads no tensor's values, so meta tensors will do."""
    for name, gate in adapter.gates.items():
        check_gate(name, gate)
    used = set()
    for module, site in adapter.sites.items():
        check_site(module, site)
        if site.carry is not None:
            check_carry(module, site.carry, adapter)
        if site.gate is not None:
            used.add(site.gate)
            _check_router(module, site, adapter)
    for layer, mixture in adapter.ffn.items():
        _check_ffn(layer, adapter)
        used.add(mixture.gate)
    if unused := sorted(adapter.gates.keys() - used):
        raise AdapterUnknownTensor(
            f"No site uses the gate {shown(unused[0])} ({len(unused)} such).",
            hint="Remove it, or name it at the sites that it gates.",
            field=f"gates.{unused[0]}",
        )


def check_base(adapter: LoweredAdapter, base: BaseModel) -> None:
    """Every site is a linear layer of the base model, with its widths."""
    for module in adapter.sites:
        if module in base.head or module in base.embeddings:
            raise AdapterUnsupportedFeature(
                f"The adapter changes {shown(module)}, an embedding table or the output head.",
                hint="Merge the adapter into its base model and serve the result, or make it without this module.",
                field=module,
            )
    unknown = sorted(module for module in adapter.sites if module not in base.linears)
    if adapter.sites and len(unknown) == len(adapter.sites):
        raise _wrong_base(base, f"has no module {shown(unknown[0])}", unknown[0])
    if unknown:
        raise AdapterUnknownTensor(
            f"The base model {base.name} has no linear layer {shown(unknown[0])} ({len(unknown)} such).",
            hint="Check that the adapter was made for this base model, with its names.",
            field=unknown[0],
        )
    wrong = [module for module, site in adapter.sites.items() if _widths(site) != base.linears[module]]
    if not wrong:
        return
    module = min(wrong)
    found, expected = _widths(adapter.sites[module]), base.linears[module]
    if len(wrong) == len(adapter.sites):
        raise _wrong_base(base, f"needs widths {expected} at {shown(module)}, which has {found}", module)
    raise AdapterShapeMismatch(
        f"The adapter's widths at {shown(module)} are {found}, not {expected}.",
        hint=f"Check that it was made for {base.name}: A is [rows, d_in], B is [rank, d_out].",
        field=module,
    )


def check_values(adapter: LoweredAdapter) -> None:
    """Every number is finite, every magnitude positive, no standard deviation negative, every index in range, and some
    site changes something."""
    for name, tensor in adapter.tensors().items():
        if not all_finite(tensor):
            raise AdapterNotFinite(
                f"The adapter's {shown(name)} holds NaN or infinity.",
                hint="Its training diverged, or the file was damaged: use an earlier checkpoint.",
                field=name,
            )
    for name, gate in adapter.gates.items():
        check_expert_map(name, gate)
    effective = False
    for module, site in adapter.sites.items():
        if site.magnitude is not None and not bool((site.magnitude > 0).all()):
            raise AdapterConfigInvalid(
                f"{shown(module)}: the magnitude of an output is {float(site.magnitude.min()):g}.",
                hint="A magnitude is the ratio of two lengths and above 0.",
                field=f"{module}.magnitude",
            )
        check_zeros(module, site)
        check_experts(module, site, None if site.gate is None else adapter.gates[site.gate])
        if site.variance is not None:
            check_deviations(module, site.variance)
        effective = effective or _has_effect(site)
    if not effective:
        raise AdapterNoEffect(
            "The adapter changes nothing: at every module A, B or the scale is zero.",
            hint="Check that training ran and that the trained weights were saved.",
        )


def all_finite(tensor: torch.Tensor) -> bool:
    """Neither NaN nor infinity."""
    # NaN comes through both extremes, and one pass without a mask is 8 to 30 times faster than isfinite.
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _has_effect(site: LoweredSite) -> bool:
    """Some rank has a nonzero row of A, a nonzero row of B and a nonzero scale; or something else is there."""
    if site.magnitude is not None or site.variance is not None or site.carry is not None:
        return True
    if site.bias is not None and bool((site.bias != 0).any()):
        return True
    reads = (site.a != 0).any(dim=1)
    if site.arow is not None:
        reads = reads[site.arow.long()]
    return bool(((site.scale != 0) & reads & (site.b != 0).any(dim=1)).any())


def _check_router(module: str, site: LoweredSite, adapter: LoweredAdapter) -> None:
    """The site's gate exists, and a router that reads the site's input has its width."""
    gate = adapter.gates.get(site.gate or "")
    if gate is None:
        raise _invalid(f"sites.{module}.gate", f"names {shown(site.gate)}, which is no gate of the adapter")
    if gate.source is GateSource.SITE_INPUT and gate.width != site.a.shape[1]:
        raise AdapterShapeMismatch(
            f"The gate {shown(site.gate)} reads {gate.width} numbers, but {shown(module)} has "
            f"{site.a.shape[1]} inputs.",
            hint="Sites whose inputs have other widths need gates of their own.",
            field=f"gate:{site.gate}.weights",
        )


def _check_ffn(layer: str, adapter: LoweredAdapter) -> None:
    mixture = adapter.ffn[layer]
    place = f"ffn.{layer}"
    gate = adapter.gates.get(mixture.gate)
    if gate is None or gate.source is not GateSource.FFN_INPUT:
        raise _invalid(f"{place}.gate", f"names {shown(mixture.gate)}, which is no gate that reads ffn_input")
    for module in mixture.modules:
        site = adapter.sites.get(module)
        if site is None or site.gate != mixture.gate:
            raise _invalid(place, f"names {shown(module)}, which is no site with the gate {shown(mixture.gate)}")
        if module != mixture.down_proj and site.a.shape[1] != gate.width:
            raise AdapterShapeMismatch(
                f"The gate {shown(mixture.gate)} reads {gate.width} numbers, but {shown(module)} has "
                f"{site.a.shape[1]} inputs.",
                hint="The router of a feed-forward block reads what the block reads.",
                field=f"gate:{mixture.gate}.weights",
            )


def _widths(site: LoweredSite) -> tuple[int, int]:
    return site.a.shape[1], site.b.shape[1]


def _invalid(field: str, what: str) -> AdapterError:
    return AdapterConfigInvalid(f"{shown(field)} {what}.", hint="Correct the description.", field=field)


def _wrong_base(base: BaseModel, reason: str, field: str) -> AdapterWrongBase:
    return AdapterWrongBase(
        f"The adapter was made for another base model: {base.name} {reason}.",
        hint=f"Serve it on its own base model, or make it for {base.name}.",
        field=field,
    )
