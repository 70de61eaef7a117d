"""One adapter out of prepared ones, kept like them: what requests ask for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loramux_adapters.artefact import Artefact, open_artefact
from loramux_adapters.base_model import BaseModel
from loramux_adapters.compose.arrow import arrow
from loramux_adapters.compose.linear import linear
from loramux_adapters.errors import AdapterTooLarge, shown
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.prepare import keep


@dataclass(frozen=True)
class Part:
    """A prepared adapter, its weight, and which of its tasks if it has some; `name` is for messages."""

    name: str
    artefact: Artefact
    weight: float
    task: int | None = None  # none: the default one


@dataclass(frozen=True)
class Router:
    """Arrow's options: how many parts a token uses, and the temperature of the softmax over those."""

    top_k: int
    temperature: float = 1.0


def compose(
    parts: Sequence[Part], router: Router | None = None, *, base: BaseModel, cache: Path, max_rank: int
) -> Artefact:
    """Keep the weighted sum of prepared adapters in `cache`, like `prepare`.

    Or, with a `router`, their mixture, whose expert e is the e-th part; weights are 1 then.

    Raises AdapterTooLarge if a module's ranks add up to more than `max_rank`, what `linear` and `arrow` raise,
    AdapterCorrupt or AdapterNotFound for a part whose artefact is damaged or lost, and OSError for the cache.
    """
    _check_ranks(parts, max_rank)
    if router is None:
        composed = linear([(part.name, _opened(part), part.weight) for part in parts], base=base)
    else:
        named = [(part.name, _opened(part)) for part in parts]
        composed = arrow(named, base=base, top_k=router.top_k, temperature=router.temperature)
    return keep(composed, base.name, cache)


def _opened(part: Part) -> LoweredAdapter:
    # Without warnings, which would bring names: who has parts of the same content gets the same file.
    return replace(open_artefact(part.artefact.path, part.task), warnings=())


def _check_ranks(parts: Sequence[Part], max_rank: int) -> None:
    ranks: Counter[str] = Counter()
    for part in parts:
        ranks.update(part.artefact.summary.ranks)
    module = max(sorted(ranks), key=ranks.__getitem__, default="")
    if ranks[module] > max_rank:
        each = " + ".join(str(part.artefact.summary.ranks.get(module, 0)) for part in parts)
        raise AdapterTooLarge(
            f"The ranks at {shown(module)} add up to {ranks[module]} ({each}); the largest that is served is "
            f"{max_rank}.",
            hint="Leave a part out, recompress one (loramux adapters compact), or start the server with a larger "
            "--max-lora-rank.",
        )
