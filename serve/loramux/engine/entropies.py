"""The entropy of what each token of an answer was chosen from, in a worker: read off the logits of the step.

    H[p_t] = −Σ_v p_t(v) log p_t(v)      over the whole vocabulary, before temperature, penalties and masks

Nothing is computed twice: the rows are those that the step samples from, as the model gave them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from loramux.engine.sequences import first_positions

logger = logging.getLogger("vllm.loramux")

#: Requests that nobody asked about: their clients left. The oldest go first.
_MAX_TAGS = 4096
_CHUNK = 64

Logits = Callable[..., torch.Tensor | None]


class Entropies:
    """Owned by the worker; all but `take` runs inside engine steps, in this order: `plan`, `order`, `read`."""

    def __init__(self) -> None:
        self._tags: dict[str, tuple[str, int]] = {}  # running request -> tag, tokens of its prompt
        self._found: dict[str, dict[int, torch.Tensor]] = {}  # tag -> token of the answer -> its entropy
        self._planned: dict[str, int] = {}  # request -> token of the answer that the step samples
        self._order: Sequence[str] | None = None

    def watch(self, request_id: str, tag: str, prompt: int) -> None:
        """Read a request that enters the engine (or enters it again)."""
        while len(self._found) >= _MAX_TAGS:
            del self._found[next(iter(self._found))]
        self._tags[request_id] = tag, prompt
        self._found.setdefault(tag, {})

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have left the engine; what was read of them stays."""
        if self._tags:
            for request_id in request_ids:
                self._tags.pop(request_id, None)

    def plan(self, scheduled: Any) -> None:
        """Which requests the coming step gives a token, by vLLM's SchedulerOutput."""
        self._planned, self._order = {}, None
        if not self._tags:
            return
        computed = first_positions(scheduled)
        for request_id, (_, prompt) in self._tags.items():
            if (count := scheduled.num_scheduled_tokens.get(request_id)) is not None:
                token = computed[request_id] + count - prompt
                if token >= 0:  # else there is more of the prompt to come
                    self._planned[request_id] = token

    def order(self, request_ids: Sequence[str]) -> None:
        """The requests of the step, in the order of its rows."""
        if self._planned:
            self._order = list(request_ids)

    def wrapped(self, inner: Logits) -> Logits:
        """`inner`, a model's `compute_logits`, with the first call of each step read."""

        def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits = inner(*args, **kwargs)
            if self._order is not None and logits is not None:
                order, planned = self._order, self._planned
                self._planned, self._order = {}, None  # of this step alone
                try:
                    self._read(order, planned, logits)
                except Exception:  # the step is everybody's
                    logger.exception("the entropies of a step were not read")
            return logits

        return compute_logits

    def take(self, tag: str) -> list[float | None]:
        """Of every token that was sampled for a tag, once; None where nothing was read."""
        found = self._found.pop(tag, {})
        if not found:
            return []
        values = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
        return [values.get(token) for token in range(max(values) + 1)]

    def _read(self, order: Sequence[str], planned: Mapping[str, int], logits: torch.Tensor) -> None:
        if len(order) != len(logits):  # speculative decoding: a row is not a request
            return
        rows = [row for row, request_id in enumerate(order) if request_id in planned]
        for begin in range(0, len(rows), _CHUNK):
            part = rows[begin : begin + _CHUNK]
            selected = logits if len(part) == len(logits) else logits[part]
            logp = torch.log_softmax(selected, -1, dtype=torch.float32)
            entropies = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)
            for row, entropy in zip(part, entropies.unbind(), strict=True):
                tag, _ = self._tags[order[row]]
                if (found := self._found.get(tag)) is not None:
                    found[planned[order[row]]] = entropy
