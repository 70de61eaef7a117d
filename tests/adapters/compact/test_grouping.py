"""Both rules by hand, and what holds for every usage and similarity."""

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.compact.grouping import group_by_loss, group_by_usage, numbered


def shares(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def counts(groups: dict[str, list[int]]) -> dict[str, int]:
    return {name: max(found) + 1 for name, found in groups.items()}


def test_mc_smoe_routers_whose_usage_is_spread_keep_more() -> None:
    usage = {"narrow": shares(0.94, 0.02, 0.02, 0.02), "spread": shares(0.25, 0.3, 0.25, 0.2)}
    likeness = {name: torch.eye(4).double() for name in usage}
    assert counts(group_by_usage(usage, likeness, 2, even=False)) == {"narrow": 1, "spread": 3}
    assert counts(group_by_usage(usage, likeness, 2, even=True)) == {"narrow": 2, "spread": 2}
    # Every router keeps its most used expert, however little that is used.
    usage = {"flat": shares(*[1 / 8] * 8), "sharp": shares(0.6, 0.4)}
    likeness = {name: torch.eye(len(found)).double() for name, found in usage.items()}
    assert counts(group_by_usage(usage, likeness, 1, even=False)) == {"flat": 1, "sharp": 1}


def test_mc_smoe_others_join_the_dominant_expert_that_is_most_like_them() -> None:
    likeness = torch.eye(5, dtype=torch.float64)
    for e, d, value in ((0, 1, 0.9), (0, 3, 0.1), (2, 1, -0.5), (2, 3, -0.1), (4, 1, 0.2), (4, 3, 0.2)):
        likeness[e, d] = likeness[d, e] = value
    # 1 and 3 are used most. 0 is like 1, 2 less unlike 3, and 4 like both, so that the more used one decides.
    found = group_by_usage({"g": shares(0.1, 0.4, 0.1, 0.3, 0.1)}, {"g": likeness}, 2, even=False)
    assert found == {"g": [0, 0, 1, 1, 0]}


def test_by_loss_like_experts_come_first_though_they_are_used_most() -> None:
    """Two used twins and two rarely used strangers: MC-SMoE keeps the twins apart."""
    vectors = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    usage, outputs = {"g": shares(0.4, 0.4, 0.1, 0.1)}, {"g": vectors @ vectors.T}
    assert group_by_loss(usage, outputs, 3, even=False) == {"g": [0, 0, 1, 2]}
    assert group_by_loss(usage, outputs, 2, even=False) == {"g": [0, 0, 1, 1]}
    assert group_by_usage(usage, outputs, 2, even=False) == {"g": [0, 1, 0, 0]}


def test_by_loss_a_router_of_like_experts_gives_up_more() -> None:
    alike = torch.ones(4, 2).double() + 0.1 * torch.eye(4, 2).double()
    usage = {"alike": shares(*[0.25] * 4), "different": shares(*[0.25] * 4)}
    outputs = {"alike": alike @ alike.T, "different": torch.eye(4).double()}
    assert counts(group_by_loss(usage, outputs, 2, even=False)) == {"alike": 1, "different": 3}
    assert counts(group_by_loss(usage, outputs, 2, even=True)) == {"alike": 2, "different": 2}


def loss(groups: list[int], usage: torch.Tensor, vectors: torch.Tensor) -> float:
    total = 0.0
    for number in set(groups):
        mine = torch.tensor(groups) == number
        f, v = usage[mine, None], vectors[mine]
        total += float((f * (v - (f * v).sum(0) / f.sum()).square()).sum())
    return total


@settings(max_examples=20, deadline=None)
@given(experts=st.integers(2, 5), seed=st.integers(0, 1000))
def test_by_loss_the_first_merge_is_the_best_of_all(experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    usage = torch.rand(experts, generator=generator, dtype=torch.float64) + 0.2
    usage = usage / usage.sum()
    vectors = torch.randn(experts, 3, generator=generator, dtype=torch.float64)
    found = group_by_loss({"g": usage}, {"g": vectors @ vectors.T}, experts - 1, even=False)["g"]
    every = (list(map_) for map_ in product(range(experts), repeat=experts) if len(set(map_)) == experts - 1)
    best = min(loss(map_, usage, vectors) for map_ in every)
    assert abs(loss(found, usage, vectors) - best) <= 1e-2 * best  # usage is smoothed by a thousandth


@settings(max_examples=40, deadline=None)
@given(data=st.data(), routers=st.integers(1, 4), experts=st.integers(1, 16), seed=st.integers(0, 1000))
def test_counts_add_up_and_groups_are_numbered_in_order(
    data: st.DataObject, routers: int, experts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = data.draw(st.lists(st.integers(1, 16), min_size=routers, max_size=routers))
    usage = {str(i): torch.rand(size, generator=generator, dtype=torch.float64) for i, size in enumerate(sizes)}
    usage = {name: values / values.sum() for name, values in usage.items()}
    vectors = {name: torch.randn(len(v), 4, generator=generator, dtype=torch.float64) for name, v in usage.items()}
    products = {name: found @ found.T for name, found in vectors.items()}
    for rule in (group_by_loss, group_by_usage):
        groups = rule(usage, products, experts, even=False)
        assert sum(counts(groups).values()) == max(routers, min(experts * routers, sum(sizes)))
        assert all(found == numbered(found) and len(found) == len(usage[name]) for name, found in groups.items())
        assert counts(rule(usage, products, experts, even=True)) == {
            name: min(experts, len(values)) for name, values in usage.items()
        }
    for name, found in group_by_usage(usage, products, experts, even=False).items():
        # The most used experts lead groups of their own.
        leaders = usage[name].argsort(descending=True)[: max(found) + 1].tolist()
        assert len({found[e] for e in leaders}) == len(leaders)
