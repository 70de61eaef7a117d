"""A whole adapter made smaller: every site, and the map of every router whose experts were merged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.compact.grouping import group_by_loss, group_by_usage
from loramux_adapters.compact.merging import CompactedSite, compact_site
from loramux_adapters.compact.options import Grouping, Options
from loramux_adapters.compact.statistics import RouterStatistics, usage_of
from loramux_adapters.errors import AdapterConfigInvalid, AdapterUnsupportedFeature, shown
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.serving import check_servable
from loramux_adapters.verify import verify

METHOD = "compact"


@dataclass(frozen=True, eq=False)
class Compacted:
    """`usage`: share of each expert [E], by router, that merging and errors were weighted with."""

    before: LoweredAdapter
    after: LoweredAdapter
    sites: Mapping[str, CompactedSite]
    usage: Mapping[str, torch.Tensor]


def compact(
    adapter: LoweredAdapter,
    base: BaseModel,
    options: Options,
    statistics: Mapping[str, RouterStatistics] | None = None,
) -> Compacted:
    """The adapter as the options want it, checked on `base`; `statistics` by gate are needed to merge experts.

    What the options do not touch stays bit for bit. Raises AdapterConfigInvalid for options that do not fit,
    AdapterUnsupportedFeature for an adapter that cannot be compacted, and what `verify` raises for the result.
    """
    check_compactable(adapter)
    groups: dict[str, list[int]] = {}
    if options.experts is not None:
        groups = _groups(adapter, options, statistics)
    usage = usage_of(statistics) if statistics else _even(adapter)
    sites: dict[str, CompactedSite] = {}
    for module, site in adapter.sites.items():
        if site.gate is None:
            sites[module] = compact_site(site, options)
        else:
            sites[module] = compact_site(site, options, groups.get(site.gate), usage[site.gate].tolist())
    left = {module: result.site for module, result in sites.items() if result.site is not None}
    used = {site.gate for site in left.values()}
    gates = {
        name: replace(gate, expert_map=torch.tensor(groups[name], dtype=torch.int32)) if name in groups else gate
        for name, gate in adapter.gates.items()
        if name in used
    }
    compacted = f"{adapter.method.removesuffix(f'/{METHOD}')}/{METHOD}"
    after = LoweredAdapter(compacted, left, adapter.warnings, gates)
    verify(after, base)
    check_servable(after)
    return Compacted(adapter, after, sites, usage)


def check_compactable(adapter: LoweredAdapter) -> None:
    """Raises AdapterUnsupportedFeature naming what stands in the way."""
    check_servable(adapter)
    for name, gate in sorted(adapter.gates.items()):
        if gate.capacity is not None:
            raise _unsupported(
                f"gates.{name}.capacity", "what it costs would have to be counted per sequence", "It stays as it is."
            )
        if gate.expert_map is not None:
            raise _unsupported(f"gates.{name}.expert_map", "its experts are merged already", "Compact the original.")
    for module, site in sorted(adapter.sites.items()):
        for field, fixed in _fixed(site):
            if fixed:
                raise _unsupported(
                    f"sites.{module}.{field}", "it is tied to the factors as they are", "It stays as is."
                )


def _fixed(site: LoweredSite) -> tuple[tuple[str, bool], ...]:
    return (
        ("carry", site.carry is not None),
        ("variance", site.variance is not None),
        ("magnitude", site.magnitude is not None and site.magnitude.ndim == 2),
    )


def _groups(
    adapter: LoweredAdapter, options: Options, statistics: Mapping[str, RouterStatistics] | None
) -> dict[str, list[int]]:
    """The map of each router whose experts are merged."""
    most = max((gate.scored for gate in adapter.gates.values()), default=0)
    if not adapter.gates or options.experts is None or options.experts > most:
        has = f"has at most {most} experts at a router" if most else "is no mixture of experts"
        raise AdapterConfigInvalid(
            f"experts is {options.experts}, and the adapter {has}.",
            hint=f"Give 1 to {most}." if most else "Give a rank or an error bound.",
            field="experts",
        )
    if statistics is None or statistics.keys() != adapter.gates.keys():
        raise AdapterConfigInvalid(
            "Nothing tells how much each expert is used.",
            hint="Give calibration texts, or routing reports of served traffic.",
            field="calibration",
        )
    usage = usage_of(statistics)
    if options.grouping is Grouping.LOSS:
        outputs = {name: found.outputs for name, found in statistics.items()}
        groups = group_by_loss(usage, outputs, options.experts, even=options.even)
    else:
        similarity = {name: found.similarity(options.similarity) for name, found in statistics.items()}
        groups = group_by_usage(usage, similarity, options.experts, even=options.even)
    return {name: found for name, found in groups.items() if max(found) + 1 < len(found)}


def _even(adapter: LoweredAdapter) -> dict[str, torch.Tensor]:
    return {
        name: torch.full((gate.scored,), 1 / gate.scored, dtype=torch.float64) for name, gate in adapter.gates.items()
    }


def _unsupported(field: str, why: str, hint: str) -> AdapterUnsupportedFeature:
    return AdapterUnsupportedFeature(
        f"{shown(field)} keeps the adapter from being compacted: {why}.", hint=hint, field=field
    )
