"""Teacher-forced reads in a worker: what each draw of a Bayesian adapter says about given tokens.

A *job* has n tokens and S draws. For each draw the API process sends one request, whose prompt ends with the tokens
(the last of them left out); the rows of its forward pass that predict them are read here:

    log p_s(v_t)      for the targets v of token t                       float64, [S, n, k]
    H[p_s,t]          over the whole vocabulary                          float64, [S, n]
    Σ_s p_s,t         the running sum, of which H[mean_s p_s,t] is made  float32, [n, vocabulary]

Only the sum is large: its memory is set aside at the start, and a job holds n rows of it until it is dropped. A row
that is computed again (preemption, a read that is repeated) counts once. Logits are the model's own, before
temperature, penalties and masks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

logger = logging.getLogger("vllm.loramux")

#: Rows whose logits are held at once, in float64: 64 MiB for a vocabulary of 128k.
_CHUNK = 64
#: Jobs that nobody took or dropped: the API process always does, so these are a fault. The oldest go first.
_MAX_JOBS = 256

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows of a step's hidden states that belong to one request."""

    request_id: str
    row: int  # the first
    position: int  # of the first, in the request
    count: int


@dataclass(eq=False)
class _Job:
    seen: np.ndarray  # [S, n]: read
    logp: torch.Tensor  # [S, n, k] float64, NaN where nothing was read
    entropy: torch.Tensor | None  # [S, n] float64; None: only targets are asked for
    rows: torch.Tensor | None  # [n] of the sum
    error: str | None = None


@dataclass(frozen=True, eq=False)
class _Read:
    """One draw's request."""

    job: _Job
    draw: int
    first: int  # position of the row that predicts the job's first token
    targets: torch.Tensor  # [n, k]


class Scoring:
    """The jobs of one worker. `watch`, `forget` and `observe` run inside engine steps."""

    def __init__(self, *, vocabulary: int, state_bytes: int, device: torch.device) -> None:
        self.rows = state_bytes // (4 * vocabulary)
        self._sum = torch.zeros(self.rows, vocabulary, dtype=torch.float32, device=device)
        self._free = list(range(self.rows))
        self._device = device
        self._jobs: dict[str, _Job] = {}
        self._reads: dict[str, _Read] = {}

    @property
    def idle(self) -> bool:
        """No request of the engine is read."""
        return not self._reads

    def wants(self, request_id: str) -> bool:
        return request_id in self._reads

    def watch(self, request_id: str, spec: dict[str, Any]) -> None:
        """Read a request that enters the engine: `job`, `draw` of `draws`, `first`, `targets` [n][k], `full`."""
        targets = torch.tensor(spec["targets"], dtype=torch.int64, device=self._device)
        job = self._jobs.get(spec["job"])
        if job is None:
            job = self._begin(spec["job"], int(spec["draws"]), targets.shape, bool(spec["full"]))
        if job.error is None:
            self._reads[request_id] = _Read(job, int(spec["draw"]), int(spec["first"]), targets)

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have left the engine; their jobs stay."""
        if self._reads:
            for request_id in request_ids:
                self._reads.pop(request_id, None)

    def observe(self, hidden: torch.Tensor, layout: Iterable[Rows], logits: Logits) -> None:
        """Read what is asked for among the hidden states of a step. Does not raise: the job ends with an error."""
        for rows in layout:
            read = self._reads.get(rows.request_id)
            if read is None or read.job.error is not None:
                continue
            try:
                self._observe(read, hidden, rows, logits)
            except Exception as error:
                logger.exception("a teacher-forced read failed")
                read.job.error = f"{type(error).__name__}: {error}"

    def take(self, name: str) -> dict[str, Any] | None:
        """What a job has read so far; it stays until it is dropped. `total` is H[mean_s p_s] over the draws read."""
        job = self._jobs.get(name)
        if job is None:
            return None
        return {
            "error": job.error,
            "logp": job.logp.tolist(),
            "entropy": None if job.entropy is None else job.entropy.tolist(),
            "total": None if job.rows is None else self._total(job.rows, job.seen.sum(0)),
            "seen": job.seen.tolist(),
        }

    def drop(self, name: str) -> None:
        """End a job, whether or not its requests have ended, and give its rows back."""
        job = self._jobs.pop(name, None)
        if job is None:
            return
        self._reads = {request_id: read for request_id, read in self._reads.items() if read.job is not job}
        if job.rows is not None:
            self._free += job.rows.tolist()

    def _begin(self, name: str, draws: int, shape: Sequence[int], full: bool) -> _Job:
        while len(self._jobs) >= _MAX_JOBS:
            self.drop(next(iter(self._jobs)))
        n, k = shape
        job = _Job(
            seen=np.zeros((draws, n), dtype=bool),
            logp=torch.full((draws, n, k), torch.nan, dtype=torch.float64, device=self._device),
            entropy=torch.full((draws, n), torch.nan, dtype=torch.float64, device=self._device) if full else None,
            rows=None,
        )
        self._jobs[name] = job
        if full and n > len(self._free):
            job.error = f"{n} rows do not fit into the {len(self._free)} that are free"
        elif full:
            taken, self._free = self._free[:n], self._free[n:]
            job.rows = torch.tensor(taken, dtype=torch.int64, device=self._device)
            self._sum.index_fill_(0, job.rows, 0)
        return job

    def _observe(self, read: _Read, hidden: torch.Tensor, rows: Rows, logits: Logits) -> None:
        begin = max(rows.position, read.first)
        end = min(rows.position + rows.count, read.first + len(read.targets))
        for position in range(begin, end, _CHUNK):
            tokens = np.arange(position, min(position + _CHUNK, end)) - read.first
            tokens = tokens[~read.job.seen[read.draw, tokens]]
            if len(tokens):
                at = torch.from_numpy(tokens + (read.first - rows.position + rows.row)).to(hidden.device)
                self._read(read, torch.from_numpy(tokens).to(self._device), logits(hidden[at]))
                read.job.seen[read.draw, tokens] = True

    def _read(self, read: _Read, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        job = read.job
        logp = torch.log_softmax(logits.double(), -1)
        job.logp[read.draw, tokens] = logp.gather(1, read.targets[tokens])
        if job.entropy is not None and job.rows is not None:
            p = logp.exp_()
            job.entropy[read.draw, tokens] = torch.special.entr(p).sum(-1)
            self._sum.index_add_(0, job.rows[tokens], p.float())

    def _total(self, rows: torch.Tensor, counts: np.ndarray) -> list[float]:
        total = []
        for part in torch.split(rows, _CHUNK):
            mean = self._sum[part].double()
            # Not by the number of draws: what rounding to float32 did to all of them alike cancels.
            mean /= mean.sum(-1, keepdim=True)
            total.append(torch.special.entr(mean).sum(-1))
        entropies = torch.cat(total).cpu().numpy() if total else np.zeros(0)
        return [float(value) for value in np.where(counts > 0, entropies, np.nan)]
