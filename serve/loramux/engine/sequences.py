"""Sequences whose tokens are counted: those of requests for an adapter with a capacity.

The data plane keeps counts of a sequence's tokens in rows (`loramux_kernels.sequences`). Here a running request gets
two of them, whatever its place in the batch, and is followed by the position at which each step takes it up. At 0 it
begins, for the first time or anew after a preemption. Else it has to go on where its last step ended: if it does not,
tokens were skipped whose counts nobody has, as after a hit in the prefix cache, and its answer would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from loramux_kernels import CountRows


class CountedSequences:
    """Rows of counts of at most `most` running requests. `scheduled` comes before each step, `rows` in it."""

    def __init__(self, most: int) -> None:
        self._free = list(range(most))
        self._known: dict[str, _Counted] = {}  # by request, the longest unused first
        self._scheduled: Any = None

    def scheduled(self, output: Any) -> None:
        """vLLM's SchedulerOutput of the coming step: who left the batch, and where the others begin."""
        self._scheduled = output
        if self._known:
            self._forget(output.finished_req_ids)
            self._forget(output.preempted_req_ids or ())

    def rows(self, places: np.ndarray, lengths: np.ndarray, request_ids: Sequence[str]) -> tuple[CountRows, list[int]]:
        """Rows for a batch in which the requests at these places are counted, and the places whose counts are lost."""
        read, write = np.full((2, len(lengths)), -1, np.int32)
        begins = first_positions(self._scheduled)
        lost = []
        for place in places.tolist():
            rows = self._advance(request_ids[place], begins.get(request_ids[place]), int(lengths[place]))
            if rows is None:
                lost.append(place)
            else:
                read[place], write[place] = rows
        return CountRows(read, write), lost

    def _advance(self, request_id: str, begin: int | None, length: int) -> tuple[int, int] | None:
        sequence = self._known.pop(request_id, None)
        if begin is None or (begin > 0 and (sequence is None or sequence.end != begin)):
            if sequence is not None:
                self._free.append(sequence.number)
            return None
        if sequence is None:
            if not self._free:  # a request that nobody said had left
                self._forget([next(iter(self._known))])
            sequence = _Counted(self._free.pop())
        read = sequence.row if begin > 0 else -1
        sequence.row = 2 * sequence.number + 1 - sequence.row % 2
        sequence.end = begin + length
        self._known[request_id] = sequence
        return read, sequence.row

    def _forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if (sequence := self._known.pop(request_id, None)) is not None:
                self._free.append(sequence.number)


class _Counted:
    """`row`: where its counts were left last. `end`: how many of its tokens are counted."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.row = 2 * number
        self.end = 0


def first_positions(output: Any) -> dict[str, int]:
    """Request -> position of its first token in the step."""
    if output is None:
        return {}
    cached = output.scheduled_cached_reqs
    begins = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return begins | {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}


def uncountable(config: Any) -> str | None:
    """Why an engine with this configuration cannot count the tokens of a sequence, or None."""
    if config.speculative_config is not None:
        return "it takes back tokens that a draft model proposed: start without --speculative-config"
    if config.kv_transfer_config is not None:
        return "a KV connector brings prefixes that it did not compute: start without --kv-transfer-config"
    return None
