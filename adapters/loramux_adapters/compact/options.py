"""How small an adapter is to become."""

from dataclasses import dataclass
from enum import StrEnum

from loramux_adapters.errors import AdapterConfigInvalid


class Grouping(StrEnum):
    """How experts are chosen to be merged (`grouping.py`)."""

    LOSS = "loss"
    MC_SMOE = "mc-smoe"


class Similarity(StrEnum):
    """What makes two experts alike, in MC_SMOE."""

    OUTPUTS = "outputs"  # cosine of what they add, over all tokens and all sites of the router
    LOGITS = "logits"  # cosine of their router scores over all tokens, as in the MC-SMoE paper


@dataclass(frozen=True)
class Options:
    """What to reduce. Raises AdapterConfigInvalid naming the option.

    experts     how many experts a router keeps on average; None: experts are not merged
    even        every router keeps so many, instead of more where merging loses more
    rank        largest rank of one expert, or of a plain LoRA, at a site
    error       bound on ‖ΔW' − ΔW‖_F / ‖ΔW‖_F, for each expert at each site
    residual    rank that each merged expert keeps of its own beside its group
    """

    experts: int | None = None
    even: bool = False
    rank: int | None = None
    error: float | None = None
    residual: int = 0
    grouping: Grouping = Grouping.LOSS
    similarity: Similarity = Similarity.OUTPUTS

    def __post_init__(self) -> None:
        if self.experts is None and self.rank is None and self.error is None:
            raise _invalid("experts", "Nothing to reduce was named.", "Give experts, a rank or an error.")
        for field in ("experts", "rank"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise _invalid(field, f"{field} is {value}.", "Give a positive number.")
        if self.residual < 0:
            raise _invalid("residual", f"residual is {self.residual}.", "Give a rank, or 0 for none.")
        if self.error is not None and not 0 < self.error < 1:
            raise _invalid("error", f"error is {self.error}.", "Give a number between 0 and 1: 0.1 is ten per cent.")
        if self.rank is not None and self.error is not None:
            raise _invalid("error", "Both a rank and an error bound are given.", "Give one of them.")
        if self.error is not None and self.residual:
            raise _invalid(
                "residual", "Both an error bound and a residual rank are given.", "The bound finds its rank."
            )
        if self.similarity is not Similarity.OUTPUTS and self.grouping is not Grouping.MC_SMOE:
            raise _invalid(
                "similarity", "Only grouping mc-smoe can use similarity logits.", "Choose that grouping too."
            )
        if self.experts is None and (self.residual or self.even):
            field = "residual" if self.residual else "even"
            raise _invalid(field, f"{field} is about merged experts, and none are merged.", "Give experts too.")


def _invalid(field: str, what: str, hint: str) -> AdapterConfigInvalid:
    return AdapterConfigInvalid(what, hint=hint, field=field)
