"""Every token of a sequence is counted once and in order, or the request is known to have no counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.engine.sequences import CountedSequences, uncountable

MOST = 3


def output(
    new: dict[str, int] | None = None,
    cached: dict[str, int] | None = None,
    finished: tuple[str, ...] = (),
    preempted: tuple[str, ...] | None = None,
) -> Any:
    """A SchedulerOutput: where the step's requests begin."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=r, num_computed_tokens=n) for r, n in (new or {}).items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached or {}), num_computed_tokens=list((cached or {}).values())
        ),
        finished_req_ids=set(finished),
        preempted_req_ids=None if preempted is None else set(preempted),
    )


def rows(sequences: CountedSequences, request_ids: list[str], lengths: list[int]) -> tuple[list[Any], list[int]]:
    counts, lost = sequences.rows(np.arange(len(lengths)), np.array(lengths, np.int32), request_ids)
    return list(zip(counts.read.tolist(), counts.write.tolist(), strict=True)), lost


def test_a_sequence_goes_on_from_what_its_last_step_wrote() -> None:
    sequences = CountedSequences(MOST)
    sequences.scheduled(output(new={"a": 0, "b": 0}))
    ((none, a), (_, b)), lost = rows(sequences, ["a", "b"], [5, 2])
    assert none == -1 and a // 2 != b // 2 and not lost
    sequences.scheduled(output(cached={"b": 2, "a": 5}))  # in another order, and one token each
    (second_b, second_a), _ = rows(sequences, ["b", "a"], [1, 1])
    assert second_a == (a, a ^ 1) and second_b == (b, b ^ 1)
    sequences.scheduled(output(cached={"a": 6}))  # b waits in the batch
    assert rows(sequences, ["a"], [1])[0] == [(a ^ 1, a)]
    sequences.scheduled(output(cached={"b": 3}))
    assert rows(sequences, ["b"], [1])[0] == [(b ^ 1, b)]


def test_rows_of_others_in_the_batch_are_left_alone() -> None:
    sequences = CountedSequences(MOST)
    sequences.scheduled(output(new={"plain": 64, "a": 0}))
    counts, lost = sequences.rows(np.array([1]), np.array([1, 4], np.int32), ["plain", "a"])
    assert counts.write[0] == -1 and counts.write[1] >= 0 and lost == []


@pytest.mark.parametrize("cached", [16, 1])
def test_a_request_behind_a_cached_prefix_has_no_counts(cached: int) -> None:
    sequences = CountedSequences(MOST)
    sequences.scheduled(output(new={"a": cached, "b": 0}))
    (_, (read, write)), lost = rows(sequences, ["a", "b"], [5, 2])
    assert lost == [0] and read == -1 and write >= 0
    sequences.scheduled(output(cached={"a": cached + 5}))
    assert rows(sequences, ["a"], [1])[1] == [0]


def test_a_gap_or_a_token_twice_is_noticed() -> None:
    for begin in (3, 5):
        sequences = CountedSequences(MOST)
        sequences.scheduled(output(new={"a": 0}))
        rows(sequences, ["a"], [4])
        sequences.scheduled(output(cached={"a": begin}))
        assert rows(sequences, ["a"], [1])[1] == [0]
        sequences.scheduled(output(new={"b": 0, "c": 0, "d": 0}))  # its rows are free again
        assert rows(sequences, ["b", "c", "d"], [1, 1, 1])[1] == []


def test_a_step_that_nobody_announced_has_no_counts() -> None:
    assert rows(CountedSequences(MOST), ["a"], [4])[1] == [0]


@pytest.mark.parametrize("again", ["new", "cached"])
def test_a_preempted_request_begins_anew(again: str) -> None:
    """The V2 runner sends it as a new request, the V1 runner as one that is known."""
    sequences = CountedSequences(MOST)
    sequences.scheduled(output(new={"a": 0}))
    rows(sequences, ["a"], [4])
    sequences.scheduled(output(**{again: {"a": 0}}, preempted=("a",)))
    ((read, _),), lost = rows(sequences, ["a"], [5])
    assert read == -1 and not lost


def test_a_request_that_left_unannounced_gives_way_to_a_new_one() -> None:
    sequences = CountedSequences(2)
    for name in "abc":
        sequences.scheduled(output(new={name: 0}))
        assert rows(sequences, [name], [1])[1] == []
    sequences.scheduled(output(cached={"a": 1, "c": 1}))
    assert rows(sequences, ["a", "c"], [1, 1])[1] == [0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_two_running_requests_share_rows(data: st.DataObject) -> None:
    """Random arrivals, steps, ends and preemptions, against what each sequence has computed."""
    sequences, running, done, number = CountedSequences(MOST), list[str](), dict[str, int](), 0
    held: dict[str, int] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        gone = [r for r in running if data.draw(st.booleans())] if data.draw(st.booleans()) else []
        back = tuple(r for r in gone if data.draw(st.booleans()))
        for request in gone:
            running.remove(request)
        waiting = [r for r in done if done[r] < 0 and r not in running]
        for request in back:
            done[request] = -1
        while len(running) < MOST and data.draw(st.booleans()):
            if waiting and data.draw(st.booleans()):
                running.append(waiting.pop())
            else:
                number += 1
                running.append(f"r{number}")
            done[running[-1]] = 0
        step = [r for r in running if data.draw(st.booleans())]
        sequences.scheduled(
            output(cached={r: done[r] for r in step}, finished=tuple(set(gone) - set(back)), preempted=back)
        )
        lengths = [data.draw(st.integers(1, 4)) for _ in step]
        found, lost = rows(sequences, step, lengths)
        assert not lost
        for request, length, (read, write) in zip(step, lengths, found, strict=True):
            assert read == (held[request] if done[request] else -1) and read != write
            held[request] = write
            done[request] += length
        in_use = [held[r] // 2 for r in running if done[r] > 0]
        assert len(set(in_use)) == len(in_use)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({}, None), ({"speculative_config": object()}, "speculative"), ({"kv_transfer_config": object()}, "kv-transfer")],
)
def test_engines_that_cannot_count_are_named(changes: dict[str, Any], word: str | None) -> None:
    config = SimpleNamespace(**{"speculative_config": None, "kv_transfer_config": None} | changes)
    reason = uncountable(config)
    assert (reason is None) == (word is None)
    assert word is None or word in (reason or "")
