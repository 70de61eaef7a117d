"""One site: experts merged into groups, and what is left cut to a lower rank.

    M_G  = Σ_{e in G} f_e ΔW_e / Σ f_e             cut to a rank; f_e: how much the router uses expert e
    ΔW'_e = M_G + R_e                              R_e: ΔW_e − M_G cut to a rank, mostly none

The token's weight for M_G is the sum of its members' and for R_e that of e alone, so the router stays as it is and
nothing is lost but what the cuts leave out. A and B are never averaged: (B T⁻¹)(T A) is the same expert for every T.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loramux_adapters.compact.factors import Factors, Rows, distance, nearest, norm, total
from loramux_adapters.compact.options import Options
from loramux_adapters.lowered import LoweredSite


@dataclass(frozen=True, eq=False)
class CompactedSite:
    """`site` None: it adds nothing. By expert: the norm of its ΔW, and how far the new one is from it."""

    site: LoweredSite | None
    norms: tuple[float, ...]
    distances: tuple[float, ...]


def compact_site(
    site: LoweredSite, options: Options, groups: Sequence[int] | None = None, usage: Sequence[float] = (1.0,)
) -> CompactedSite:
    """`groups`: of each expert, None if none are merged. `usage`: share of each expert; of a plain LoRA just one."""
    experts = [_rows_of(site, e) for e in range(len(usage))]
    blocks: dict[int, Rows] = {}
    if groups is None:
        blocks = {e: cut(rows, options) for e, rows in enumerate(experts)}
        parts = [[rows] for rows in blocks.values()]
    else:
        count = max(groups) + 1
        for number in range(count):
            members = {e: experts[e] for e, of in enumerate(groups) if of == number}
            merged, own = _merge(members, usage, options)
            blocks[number] = merged
            blocks |= {count + e: rows for e, rows in own.items()}
        parts = [[blocks[of], *([blocks[count + e]] if count + e in blocks else [])] for e, of in enumerate(groups)]
    norms = tuple(norm(rows.factors) for rows in experts)
    distances = tuple(_distance(rows, stored) for rows, stored in zip(experts, parts, strict=True))
    return CompactedSite(_stacked(site, blocks, kept=groups is None and not any(distances)), norms, distances)


def cut(rows: Rows, options: Options) -> Rows:
    """The rows as the options allow; as they are where that saves nothing."""
    factors = rows.factors
    if options.rank is not None:
        found = nearest(factors, rows, rank=options.rank) if rows.rank > options.rank else None
    elif options.error is not None:
        found = nearest(factors, rows, bound=options.error * norm(factors))
    else:
        found = None
    return found if found is not None and found.rank < rows.rank else rows


def merge(members: Sequence[Rows], usage: Sequence[float], rank: int) -> Rows:
    """One expert for several: their mean by usage, cut to `rank`, or a member's own rows if they are nearer to all."""
    shares = list(usage) if sum(usage) > 0 else [1.0] * len(usage)
    mean = total([rows.factors.times(f / sum(shares)) for rows, f in zip(members, shares, strict=True)])
    cut_mean = nearest(mean, members[0], rank=rank)
    assert cut_mean is not None  # a rank can always be met
    candidates = [*(rows for rows in members if rows.rank <= rank), cut_mean]

    def loss(candidate: Rows) -> float:
        return sum(f * _distance(rows, [candidate]) ** 2 for rows, f in zip(members, shares, strict=True))

    return min(candidates, key=loss)


def _merge(members: dict[int, Rows], usage: Sequence[float], options: Options) -> tuple[Rows, dict[int, Rows]]:
    """What a group shares, and by expert what is its own."""
    if len(members) == 1:
        (rows,) = members.values()
        return cut(rows, options), {}
    largest = max(rows.rank for rows in members.values())
    rank = largest if options.rank is None else min(options.rank, largest)
    merged = merge(list(members.values()), [usage[e] for e in members], rank)
    if options.residual:
        rest = {e: nearest(_rest(rows, merged), rows, rank=options.residual) for e, rows in members.items()}
        return merged, {e: rows for e, rows in rest.items() if rows is not None and rows.rank}
    if options.error is None:
        return merged, {}
    alone = {e: cut(rows, options) for e, rows in members.items()}
    within = {
        e: nearest(_rest(rows, merged), rows, bound=options.error * norm(rows.factors)) for e, rows in members.items()
    }
    own = {e: rows for e, rows in within.items() if rows is not None}
    # Sharing may not reach the bound, or cost more than it saves: then the members share nothing here.
    if len(own) < len(members) or merged.rank + _ranks(own) >= _ranks(alone):
        empty = Rows(merged.a[:0], merged.b[:0], merged.scale[:0])
        return empty, {e: rows for e, rows in alone.items() if rows.rank}
    return merged, {e: rows for e, rows in own.items() if rows.rank}


def _rest(rows: Rows, merged: Rows) -> Factors:
    return total([rows.factors, merged.factors.times(-1)])


def _ranks(rows: dict[int, Rows]) -> int:
    return sum(part.rank for part in rows.values())


def _distance(rows: Rows, stored: Sequence[Rows]) -> float:
    """How far the sum of what is stored is from an expert; zero, not nearly so, for the expert's own rows."""
    parts = [part for part in stored if part.rank]
    if len(parts) == 1 and all(
        torch.equal(getattr(parts[0], name), getattr(rows, name)) for name in ("a", "b", "scale")
    ):
        return 0.0
    return distance(total([part.factors for part in stored]), rows.factors)


def _rows_of(site: LoweredSite, expert: int) -> Rows:
    mine = torch.full((site.rank,), expert == 0) if site.expert is None else site.expert == expert
    return Rows(site.expanded_a[mine], site.b[mine], site.scale[mine])


def _stacked(site: LoweredSite, blocks: dict[int, Rows], *, kept: bool) -> LoweredSite | None:
    """The site with these rank rows, by the index of the weight that they take."""
    order = sorted(index for index, rows in blocks.items() if rows.rank)
    if kept and sum(rows.rank for rows in blocks.values()) == site.rank:
        return site
    if not order:
        if site.magnitude is None and site.bias is None:
            return None
        return replace(
            site, a=site.a[:0], b=site.b[:0], scale=site.scale[:0], gate=None, expert=None, arow=None, bands=1
        )
    expert = torch.cat([torch.full((blocks[index].rank,), index, dtype=torch.int32) for index in order])
    return replace(
        site,
        a=torch.cat([blocks[index].a for index in order]),
        b=torch.cat([blocks[index].b for index in order]),
        scale=torch.cat([blocks[index].scale for index in order]),
        expert=expert if site.gate is not None else None,
        arow=None,
        bands=1,
    )
