"""Where the tokens of a step stand in their sequences: what a gate with a capacity needs to know beside the logits.

Such a gate asks, at a token, how many earlier tokens of its sequence selected each expert. Those of earlier steps are
kept in *rows of counts* beside the adapter's weights, [N, E] for each of its gates; those of this step are counted
anew, from their own logits. So tokens of a step need not wait for each other.

A step goes on from one row of a request and leaves its counts in another, so that nothing is read in a step that the
step itself writes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.integer]

PLACE_FIELDS = 3
ROWS_PER_SEQUENCE = 2


class CountRows(NamedTuple):
    """Rows of counts of each request of a step, int32, in batch order.

    `read`: where the step before left them, −1 for a request that begins. `write`: where this step leaves them, another
    row. No row is written by two requests, or by one and read by another. Without meaning for an adapter without a
    capacity.
    """

    read: Ints
    write: Ints


class Sequences:
    """The places of a step's tokens: `places_T3` on the host, or in a static buffer that kernels read.

    A place is (how many earlier tokens of its request the step has, row to read, row to write); the last is −1 but at
    the request's last token in the step.
    """

    def __init__(self, *, max_tokens: int, device: torch.device, tiled: bool) -> None:
        self.places = torch.empty(0, PLACE_FIELDS, dtype=torch.int64)
        self.buffer = torch.zeros(max_tokens if tiled else 0, PLACE_FIELDS, dtype=torch.int32, device=device)

    def update(self, lengths: Ints, counts: CountRows) -> None:
        """The step's requests have `lengths` tokens and these rows of counts."""
        ends = np.cumsum(lengths)
        tokens = int(ends[-1])
        pinned = self.buffer.is_cuda
        host = torch.empty(tokens, PLACE_FIELDS, dtype=torch.int32, pin_memory=pinned)
        out = host.numpy()
        out[:, 0] = np.arange(tokens) - np.repeat(ends - lengths, lengths)
        out[:, 1] = np.repeat(counts.read, lengths)
        out[:, 2] = -1
        live = lengths > 0
        out[ends[live] - 1, 2] = counts.write[live]
        if self.buffer.shape[0]:
            self.buffer[:tokens].copy_(host, non_blocking=True)
        else:
            self.places = host.long()
