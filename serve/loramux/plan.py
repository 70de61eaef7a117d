"""Where memory goes, decided and printed before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loramux.units import format_bytes

#: Table rows; a row is 40 KiB for 32 layers. Bytes run out long before.
SLOTS = 1024
_MIN_RANK = 256
#: Adapters that a list for people names one by one.
LISTED = 32


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device that serves."""

    device: str
    dtype: str
    adapter_bytes: int
    adapters: dict[str, int]  # name -> bytes in the pool
    max_rank: int
    kv_cache: str
    score_bytes: int = 0  # probabilities that are summed over draws
    draws: dict[str, int] = field(default_factory=dict)  # of Bayesian ones -> bytes of a draw beside its mean
    unread: int = 0  # adapters whose bytes are not known yet

    @property
    def used(self) -> int:
        return sum(self.adapters.values())

    @property
    def more_fit(self) -> int | None:
        """How many more adapters of the mean size of these fit; None without adapters."""
        if not self.used:
            return None
        return max(0, int((self.adapter_bytes - self.used) // (self.used / len(self.adapters))))

    def lines(self) -> list[str]:
        """For people."""
        sizes = sorted(self.adapters.items())
        rows = [
            f"device          {self.device}, {self.dtype}",
            f"adapter memory  {format_bytes(self.adapter_bytes)}, {format_bytes(self.used)} used by "
            f"{len(sizes)} adapters, ranks up to {self.max_rank}",
            *(f"  {name:<14}{format_bytes(size)}{self._a_draw(name)}" for name, size in sizes[:LISTED]),
        ]
        if len(sizes) > LISTED:
            rows.append(f"  … and {len(sizes) - LISTED} more")
        if self.used > self.adapter_bytes:
            fit = int(self.adapter_bytes // (self.used / len(sizes)))
            rows.append(f"  about {fit} fit at once: the others are loaded when they are asked for")
        elif self.more_fit is not None:
            rows.append(f"  room for about {self.more_fit} more of this size")
        if self.unread:
            rows.append(f"  {self.unread} more will be read after the start")
        if self.score_bytes:
            rows.append(f"score memory    {format_bytes(self.score_bytes)}")
        return [*rows, f"KV cache        {self.kv_cache}"]

    def _a_draw(self, name: str) -> str:
        return f", a draw {format_bytes(self.draws[name])} more" if name in self.draws else ""


def rank_limit(asked: int | None, ranks: Sequence[int]) -> int:
    """Largest rank the scratch has room for: what was asked, else 256 or the largest rank at the start, to 16."""
    largest = max([asked or _MIN_RANK, *ranks])
    return -(-largest // 16) * 16
