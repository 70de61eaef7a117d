"""Which experts of which router are merged, such that routers keep so many on average.

`loss`: what a group loses is Σ_{e in G} f_e E‖(ΔW_e − M_G) x‖², f_e the usage of e and M_G the members' mean by usage.
Two groups lose f_G f_H / (f_G + f_H) · E‖(M_G − M_H) x‖² more together than apart (Ward's criterion), so that
used experts are merged late and like ones early. The cheapest merges of all routers are made, each cost being relative
to what its router's experts add.

`mc-smoe` (arXiv 2310.01334, section 3.2): the experts that a router uses most are *dominant*, and each other one joins
the dominant one that it is most similar to. How many are dominant follows from one threshold on usage for all routers;
a router's most used expert counts as always used, so that every router keeps one. Two dominant experts may be alike.
"""

from collections.abc import Mapping
from itertools import combinations

import torch

# Experts that no calibration text used are still told apart by what they add.
_LEAST_USAGE = 1e-3

Merge = tuple[float, int, int]


def group_by_loss(
    usage: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], experts: int, *, even: bool
) -> dict[str, list[int]]:
    """The group of each expert, by router. `outputs` [E, E]: E⟨ΔW_e x, ΔW_e' x⟩."""
    merges = {name: _merges(shares, outputs[name]) for name, shares in usage.items()}
    if even:
        made = {name: len(shares) - min(experts, len(shares)) for name, shares in usage.items()}
    else:
        made = dict.fromkeys(usage, 0)
        costs = sorted((cost, name, i) for name, found in merges.items() for i, (cost, _, _) in enumerate(found))
        wanted = sum(len(shares) for shares in usage.values()) - experts * len(usage)
        for _, name, _ in costs[: max(0, wanted)]:
            made[name] += 1
    return {name: _joined(len(shares), merges[name][: made[name]]) for name, shares in usage.items()}


def group_by_usage(
    usage: Mapping[str, torch.Tensor], similarity: Mapping[str, torch.Tensor], experts: int, *, even: bool
) -> dict[str, list[int]]:
    """The group of each expert, by router, around its most used ones. `similarity` [E, E]."""
    counts = _dominant_counts(usage, experts, even=even)
    groups = {}
    for name, shares in usage.items():
        dominant = shares.argsort(descending=True, stable=True)[: counts[name]].tolist()
        likeness = similarity[name]
        groups[name] = numbered(
            [e if e in dominant else max(dominant, key=lambda d: float(likeness[e, d])) for e in range(len(shares))]
        )
    return groups


def numbered(leaders: list[int]) -> list[int]:
    """Groups that are known by one of their experts, numbered in the order of their first one."""
    numbers = {leader: i for i, leader in enumerate(dict.fromkeys(leaders))}
    return [numbers[leader] for leader in leaders]


def _merges(usage: torch.Tensor, outputs: torch.Tensor) -> list[Merge]:
    """All E − 1 merges, cheapest first: their cost, and an expert of each of the two groups."""
    shares = usage + _LEAST_USAGE / len(usage)
    size = float(shares @ outputs.diagonal())
    # By an expert of each group: the members' shares, zero for all others.
    groups = {e: torch.zeros_like(shares).index_fill(0, torch.tensor(e), float(shares[e])) for e in range(len(usage))}
    made: list[Merge] = []
    while len(groups) > 1:
        cost, one, other = min(
            (_loss(groups[one], groups[other], outputs), one, other) for one, other in combinations(groups, 2)
        )
        groups[one] = groups[one] + groups.pop(other)
        cost = cost / size if size > 0 else 0.0
        # Rounding aside, a merge never costs less than the ones before it.
        made.append((max([cost, *(before for before, _, _ in made[-1:])]), one, other))
    return made


def _loss(one: torch.Tensor, other: torch.Tensor, outputs: torch.Tensor) -> float:
    f, g = float(one.sum()), float(other.sum())
    apart = one / f - other / g
    return max(0.0, float(apart @ outputs @ apart)) * f * g / (f + g)


def _joined(experts: int, merges: list[Merge]) -> list[int]:
    leader = list(range(experts))
    for _, one, other in merges:
        leader = [one if of == other else of for of in leader]
    return numbered(leader)


def _dominant_counts(usage: Mapping[str, torch.Tensor], experts: int, *, even: bool) -> dict[str, int]:
    if even:
        return {name: min(experts, len(shares)) for name, shares in usage.items()}
    ranked = []
    for name, shares in usage.items():
        order = shares.argsort(descending=True, stable=True).tolist()
        # The first of each router comes before all others, whatever its share.
        ranked += [(place > 0, -float(shares[expert]), name) for place, expert in enumerate(order)]
    counts = dict.fromkeys(usage, 0)
    for _, _, name in sorted(ranked)[: experts * len(usage)]:
        counts[name] += 1
    return counts
