"""What the routers of a worker's mixtures decide: sampled for everybody, in full for requests that ask.

One decision is one token at one gate. Once in `SAMPLE_S` a step is traced and its decisions are added to their
version's sums; a request that carries a tag has every step it takes part in traced, and sums of its own. The logits
travel to the host beside the following step and are counted then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from loramux_kernels import MAX_EXPERTS, AdapterPool
from loramux_kernels.cpu.gate import gate, probabilities
from loramux_kernels.trace import Routed, Traced

SAMPLE_S = 1.0
#: Reports that nobody fetched: their clients left. The oldest go first.
_MAX_REPORTS = 1024


@dataclass
class Decisions:
    """Sums over decisions: their number, entropy in nats of the softmax, and by expert how often it was selected and
    its share of the weight; `tokens`, whose decisions these are, counts each once for all its gates."""

    decisions: int = 0
    tokens: int = 0
    entropy: float = 0.0
    experts: int = 0
    selected: np.ndarray = field(default_factory=lambda: np.zeros(MAX_EXPERTS))
    weight: np.ndarray = field(default_factory=lambda: np.zeros(MAX_EXPERTS))

    def add(self, routed: Routed, rows: np.ndarray) -> None:
        """Count the decisions for these of the routed rows."""
        kept = routed.logits[:, torch.from_numpy(np.flatnonzero(np.isin(routed.rows, rows)))]
        logits = kept.reshape(-1, routed.rule.logits)
        g, p = gate(routed.rule, logits), probabilities(routed.rule, logits)
        total = g.sum(1, keepdim=True)
        share = torch.where(total > 0, g / total, 0)
        n = routed.rule.experts
        self.experts = max(self.experts, n)
        self.decisions += logits.shape[0]
        self.entropy += float(torch.special.entr(p).sum())
        self.selected[:n] += (g > 0).sum(0).numpy()
        self.weight[:n] += share.sum(0).numpy()

    def as_dict(self) -> dict[str, Any]:
        """For the API process: plain numbers."""
        return {
            "decisions": self.decisions,
            "tokens": self.tokens,
            "entropy": self.entropy,
            "selected": self.selected[: self.experts].tolist(),
            "weight": self.weight[: self.experts].tolist(),
        }


@dataclass
class _Step:
    traced: Traced
    versions: dict[int, int]  # slot -> version id
    sampled: bool
    rows: dict[str, np.ndarray]  # tag -> its rows of the step


class RoutingMonitor:
    """Owned by the worker's AdapterManager. `before` and `after` run inside engine steps and must not be slow."""

    def __init__(self, pool: AdapterPool, *, sample_s: float = SAMPLE_S) -> None:
        self._pool = pool
        self._sample_s = sample_s
        self._mixtures: dict[int, int] = {}
        self._tags: dict[str, str] = {}  # running request -> tag
        self._reports: dict[str, Decisions] = {}
        self._sums: dict[int, Decisions] = {}
        self._last = float("-inf")
        self._planned: tuple[bool, dict[str, np.ndarray]] | None = None
        self._pending: deque[_Step] = deque()

    def add_mixture(self, slot: int, version_id: int) -> None:
        self._mixtures[slot] = version_id

    def remove_slot(self, slot: int) -> None:
        self._mixtures.pop(slot, None)

    def watch(self, request_id: str, tag: str) -> None:
        """Report on a request that enters the engine. Requests with the same tag share a report."""
        while len(self._reports) >= _MAX_REPORTS:
            del self._reports[next(iter(self._reports))]
        self._tags[request_id] = tag
        self._reports.setdefault(tag, Decisions())

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have left the engine; their reports can still be fetched."""
        if self._tags:
            for request_id in request_ids:
                self._tags.pop(request_id, None)

    def before(self, slots: np.ndarray, lengths: np.ndarray, request_ids: Sequence[str]) -> None:
        """Decide whether the coming forward pass is traced."""
        while self._pending and self._pending[0].traced.ready:
            self._count(self._pending.popleft())
        self._planned = None
        if self._mixtures and any(int(slot) in self._mixtures for slot in np.unique(slots)):
            now = time.monotonic()
            sampled = now - self._last >= self._sample_s
            rows = self._tagged_rows(lengths, request_ids) if self._tags else {}
            if sampled or rows:
                self._planned = (sampled, rows)
                self._last = now if sampled else self._last
        self._pool.trace(self._planned is not None)

    def after(self) -> None:
        """The forward pass was issued: fetch its logits."""
        if self._planned is not None:
            sampled, rows = self._planned
            self._planned = None
            self._pending.append(_Step(self._pool.take_trace(), dict(self._mixtures), sampled, rows))

    def take_sums(self) -> dict[int, dict[str, Any]]:
        """Sampled decisions by version id since the last call."""
        self._count_all()
        sums, self._sums = self._sums, {}
        return {version_id: found.as_dict() for version_id, found in sums.items()}

    def take_report(self, tag: str) -> dict[str, Any] | None:
        """All decisions for the requests of a tag, once; None if there were no such requests."""
        self._count_all()
        found = self._reports.pop(tag, None)
        return found.as_dict() if found else None

    def _tagged_rows(self, lengths: np.ndarray, request_ids: Sequence[str]) -> dict[str, np.ndarray]:
        ends = np.cumsum(lengths)
        rows: dict[str, list[np.ndarray]] = {}
        for row, request_id in enumerate(request_ids[: len(lengths)]):
            if (tag := self._tags.get(request_id)) is not None:
                rows.setdefault(tag, []).append(np.arange(ends[row] - lengths[row], ends[row]))
        return {tag: np.concatenate(parts) for tag, parts in rows.items()}

    def _count_all(self) -> None:
        while self._pending:
            self._count(self._pending.popleft())

    def _count(self, step: _Step) -> None:
        for slot, found in _by_slot(step.traced):
            version_id = step.versions.get(slot)
            if version_id is None:
                continue
            if step.sampled:
                _add(self._sums.setdefault(version_id, Decisions()), found, found[0].rows)
            for tag, rows in step.rows.items():
                if (report := self._reports.get(tag)) is not None:
                    _add(report, found, rows)


def _by_slot(traced: Traced) -> Iterable[tuple[int, list[Routed]]]:
    slots: dict[int, list[Routed]] = {}
    for routed in traced:
        slots.setdefault(routed.slot, []).append(routed)
    return slots.items()


def _add(sums: Decisions, found: list[Routed], rows: np.ndarray) -> None:
    sums.tokens += int(np.isin(found[0].rows, rows).sum())
    for routed in found:
        sums.add(routed, rows)
