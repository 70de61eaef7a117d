"""What the pool raises. Nothing is raised inside a step.

KernelError
├── PoolFull          no room: evict something or give the pool more bytes
├── UnknownModule     no site of this pool serves that linear
├── RankTooLarge      rank above the pool's max_rank
├── WrongShape        weights do not fit what was reserved
├── NotWritten        published before every reserved module was written
└── UnknownSlot       that slot is not reserved
"""

from __future__ import annotations


class KernelError(Exception):
    """Base of every error of this package."""


class PoolFull(KernelError):
    """The adapter fits into no free slot, or its blocks into no free extents. Nothing has changed."""

    def __init__(self, *, needed_bytes: int, free_bytes: int, largest_free_bytes: int, free_slots: int) -> None:
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.largest_free_bytes = largest_free_bytes
        self.free_slots = free_slots
        super().__init__(
            f"the adapter needs {needed_bytes} bytes and one slot; the pool has {free_bytes} bytes free "
            f"(largest piece {largest_free_bytes}) and {free_slots} slots"
        )


class UnknownModule(KernelError, LookupError):
    """A linear that no site of this pool serves."""

    def __init__(self, module: str) -> None:
        self.module = module
        super().__init__(f'no site serves module "{module}"')


class RankTooLarge(KernelError, ValueError):
    """A rank above the pool's limit, which sizes the scratch of every site."""

    def __init__(self, module: str, rank: int, max_rank: int) -> None:
        self.module = module
        self.rank = rank
        self.max_rank = max_rank
        super().__init__(f'module "{module}" has rank {rank}, the pool was made for ranks up to {max_rank}')


class WrongShape(KernelError, ValueError):
    """Weights whose shape differs from the reservation."""

    def __init__(self, module: str, tensor: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        self.module = module
        super().__init__(f'module "{module}": {tensor} has shape {got}, reserved was {expected}')


class NotWritten(KernelError):
    """Some reserved modules have no weights yet."""

    def __init__(self, slot: int, modules: tuple[str, ...]) -> None:
        self.slot = slot
        self.modules = modules
        super().__init__(
            f"slot {slot} cannot be published, not written yet: {', '.join(modules[:3])} ({len(modules)} in all)"
        )


class UnknownSlot(KernelError, LookupError):
    """A slot that is not reserved, or a module that its reservation does not hold."""

    def __init__(self, slot: int, module: str | None = None) -> None:
        self.slot = slot
        self.module = module
        super().__init__(f"slot {slot} is not reserved" + (f' for module "{module}"' if module else ""))
