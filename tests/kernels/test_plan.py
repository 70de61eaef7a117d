"""The plan against a token-by-token reading of the batch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_kernels.plan import SMALL_STEP, TILE_FIELDS, Plan

SLOTS, MAX_REQUESTS, MAX_TOKENS = 5, 12, 700
# Short requests as in decoding, and a few long ones, so that both tile lengths are used.
REQUESTS = st.lists(
    st.tuples(st.integers(-1, SLOTS - 1), st.one_of(st.integers(0, 3), st.integers(0, 58))), max_size=MAX_REQUESTS
)


def make(tiled: bool) -> Plan:
    return Plan(
        slots=SLOTS,
        max_requests=MAX_REQUESTS,
        max_tokens=MAX_TOKENS,
        device=torch.device("cpu"),
        tiled=tiled,
    )


def update(plan: Plan, batch: list[tuple[int, int]]) -> list[int]:
    """Plan the batch; the slot of every token, in order."""
    plan.update(np.array([s for s, _ in batch], np.int32), np.array([n for _, n in batch], np.int32))
    return [s for s, n in batch for _ in range(n)]


def served_by_tiles(plan: Plan, padded: int) -> dict[int, int]:
    """Slot by token row, as the kernels would read it."""
    tiles = plan.tiles(padded)
    rows = tiles.tiles.view(-1, TILE_FIELDS).tolist()
    assert all(slot < 0 for slot, _, _ in rows[tiles.programs :]), "a tile outside the grid"
    served: dict[int, int] = {}
    for slot, start, count in rows[: tiles.programs]:
        if slot < 0:
            continue
        assert 0 < count <= tiles.length
        for token in tiles.tokens[start : start + count].tolist():
            assert token not in served
            served[token] = slot
    return served


@settings(max_examples=50, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=4), st.integers(0, 300))
def test_tiles_serve_every_adapter_token_once(batches: list[list[tuple[int, int]]], padding: int) -> None:
    plan = make(tiled=True)
    for batch in batches:  # each over the leavings of the one before
        want = {t: s for t, s in enumerate(update(plan, batch)) if s >= 0}
        padded = min(plan.tokens + padding, MAX_TOKENS)
        assert served_by_tiles(plan, padded) == want
        assert plan.active == bool(want)
    plan.idle(True)
    assert all(not served_by_tiles(plan, padded) for padded in (1, SMALL_STEP, SMALL_STEP + 1, MAX_TOKENS))


@settings(max_examples=50, deadline=None)
@given(REQUESTS)
def test_groups_serve_every_adapter_token_once(batch: list[tuple[int, int]]) -> None:
    plan = make(tiled=False)
    token_slots = update(plan, batch)
    rows, served = torch.arange(len(token_slots)), {}
    for slot, tokens in plan.groups:
        for token in rows[tokens].tolist():
            assert token not in served
            served[token] = slot
    assert served == {t: s for t, s in enumerate(token_slots) if s >= 0}
    assert len({g.slot for g in plan.groups}) == len(plan.groups)
    assert plan.token_slots.tolist() == token_slots


def test_neighbouring_tokens_are_a_slice() -> None:
    plan = make(tiled=False)
    update(plan, [(2, 3), (1, 2), (2, 0), (1, 4), (0, 1), (2, 1)])
    kinds = {g.slot: type(g.tokens) for g in plan.groups}
    assert kinds == {0: slice, 1: slice, 2: torch.Tensor}
