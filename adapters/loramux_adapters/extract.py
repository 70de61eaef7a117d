"""An adapter out of merged weights: what training added to a base model, as a LoRA at each linear that it changed.

    ΔW = W_merged − W0      ≈ Σ_{j<r} σ_j · u_j v_jᵀ, the r largest singular components

For XGBLoRA, RAC-LoRA, COLA and whatever else merges as it trains and keeps no factors. A sum of links of rank r_t is
found again exactly at rank Σ r_t. Both checkpoints are read one layer at a time, and ΔW of one is held, in float64.

The components come from a randomised range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061)
where a layer is much larger than the rank, else from the whole SVD. The error that is stated is measured:

    error = ‖ΔW − Σ_j scale_j b_jᵀ a_j‖_F / ‖ΔW‖_F      of the factors as they are stored

Weights that were merged in 16 bits differ from W0 by a rounding of full rank, too, which no small adapter can hold.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.base_weights import BaseWeights
from loramux_adapters.compact.factors import Factors, Rows, distance, nearest
from loramux_adapters.errors import (
    AdapterConfigInvalid,
    AdapterNoEffect,
    AdapterNotFinite,
    AdapterUnsupportedFeature,
    shown,
)
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.serving import check_servable
from loramux_adapters.verify import verify

METHOD = "extract"
MAX_RANK = 64
"""Unless another is asked for. A server has room for up to 256."""
# Components beyond those that are wanted, and power iterations, of the range finder.
_SPARE, _ITERATIONS = 10, 4
# In what dtypes factors are stored.
_FLOAT32 = Rows(*[torch.empty(0, dtype=torch.float32)] * 3)


def merged_weights(source: str | Path) -> BaseWeights:
    """The checkpoint of merged weights in a folder, or of a hub id in the Hugging Face cache."""
    hint = "Give the merged model as transformers saves it, in float or FP8 safetensors."
    return BaseWeights(source, whose="merged model", hint=hint)


@dataclass(frozen=True)
class Extracted:
    """`errors`: of each layer that was changed, as the module says."""

    adapter: LoweredAdapter
    errors: Mapping[str, float]


def extract(
    merged: BaseWeights,
    base: BaseModel,
    *,
    rank: int | None = None,
    error: float | None = None,
    max_rank: int = MAX_RANK,
    on_layer: Callable[[str], object] = lambda module: None,
) -> Extracted:
    """The adapter of at most `rank` at every layer, or of the lowest rank, up to `max_rank`, that keeps `error`.

    `on_layer` is called with the name of each linear before it is compared. Raises AdapterUnsupportedFeature where a
    checkpoint cannot be read or has other shapes, where anything but linear weights differs, and where the bound needs
    a higher rank; AdapterNoEffect where nothing does; AdapterConfigInvalid naming the option.
    """
    _check_options(rank, error, max_rank)
    _check_others(merged, base)
    sites: dict[str, LoweredSite] = {}
    errors: dict[str, float] = {}
    for module in base.linears:
        on_layer(module)
        delta = _difference(merged, base, module)
        size = float(torch.linalg.vector_norm(delta))
        if size == 0:
            continue
        components, rest = _components(delta, rank or max_rank)
        if error is None:
            rows = nearest(components, _FLOAT32, rank=rank)
        else:
            rows = _within(module, components, rest, size, error, max_rank)
        assert rows is not None
        sites[module] = LoweredSite(rows.a.contiguous(), rows.b.contiguous(), rows.scale)
        errors[module] = math.hypot(rest, distance(rows.factors, components)) / size
    if not sites:
        raise AdapterNoEffect(f"The merged weights are those of {base.name}.", hint="Check which folders were given.")
    adapter = LoweredAdapter(METHOD, dict(sorted(sites.items())), tuple(_statements(errors)))
    verify(adapter, base)
    check_servable(adapter)
    return Extracted(adapter, errors)


def _difference(merged: BaseWeights, base: BaseModel, module: str) -> torch.Tensor:
    """ΔW [d_out, d_in] in float64."""
    d_in, d_out = base.linears[module]
    delta, done = torch.empty(d_out, d_in, dtype=torch.float64), 0
    changed = merged.row_blocks(module, (d_in, d_out), module in base.transposed)
    for after, before in zip(changed, base.row_blocks(module), strict=True):
        delta[done : done + len(after)] = after - before
        done += len(after)
    if not bool(delta.isfinite().all()):
        raise AdapterNotFinite(
            f"The difference at {shown(module)} holds NaN or infinity.",
            hint="Its training diverged, or a file was damaged: use an earlier checkpoint.",
            field=f"{module}.weight",
        )
    return delta


def _components(delta: torch.Tensor, count: int) -> tuple[Factors, float]:
    """At least the `count` largest singular components, and the norm of what they leave, which `delta` becomes."""
    if 4 * (count + _SPARE) >= min(delta.shape):
        u, values, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, values, v = torch.svd_lowrank(delta, q=count + _SPARE, niter=_ITERATIONS)
        vh = v.T
    b = (u * values).T
    return Factors(vh, b), float(torch.linalg.vector_norm(delta.addmm_(b.T, vh, alpha=-1)))


def _within(module: str, components: Factors, rest: float, size: float, error: float, max_rank: int) -> Rows:
    """The fewest components that keep the error in its bound."""
    bound = error * size
    # What the components leave out is orthogonal to what is left out of them.
    rows = nearest(components, _FLOAT32, bound=math.sqrt(bound**2 - rest**2)) if rest < bound else None
    if rows is not None and rows.rank <= max_rank:
        return rows
    tail = torch.linalg.vector_norm(components.b, dim=1)[max_rank:]
    lost = math.hypot(rest, float(torch.linalg.vector_norm(tail))) / size
    raise AdapterUnsupportedFeature(
        f"At {shown(module)} rank {max_rank} loses {lost:.3g} of what training changed; the bound is {error:g}.",
        hint="Allow a higher rank or a larger error. Weights merged in 16 bits carry rounding of full rank: merge in "
        "float32 if you can, or give a rank and judge the result.",
        field=module,
    )


def _check_options(rank: int | None, error: float | None, max_rank: int) -> None:
    for name, wrong, rule in (
        ("rank", (rank is None) == (error is None), "or an error must be given, and not both"),
        ("rank", rank is not None and rank < 1, "must be positive"),
        ("error", error is not None and not 0 < error < 1, "must be between 0 and 1: 0.1 is ten per cent"),
        ("max_rank", max_rank < 1, "must be positive"),
    ):
        if wrong:
            raise AdapterConfigInvalid(f"{name} {rule}.", hint="Correct the option.", field=name)


def _check_others(merged: BaseWeights, base: BaseModel) -> None:
    """All but the weights of linear layers must be the base's own."""
    before, after = _others(base.stored("weight"), base), _others(merged, base)
    if differing := sorted(before.keys() ^ after.keys()):
        where = "merged" if differing[0] in after else "base"
        raise AdapterUnsupportedFeature(
            f"Only the {where} model has {shown(differing[0])} ({len(differing)} such).",
            hint="Save both with transformers' save_pretrained, which leaves tied heads out.",
            field=differing[0],
        )
    for name, key in sorted(after.items()):
        if not _same(merged.pieces(key), base.stored(name).pieces(before[name])):
            raise AdapterUnsupportedFeature(
                f"Training changed {shown(name)}, which is no weight of a linear layer.",
                hint="An adapter made here could not give it back: serve the merged model itself.",
                field=name,
            )


def _others(weights: BaseWeights, base: BaseModel) -> dict[str, str]:
    """Name without the model's prefix -> name in the files, of all that is no linear's weight or its scale."""
    prefix = next(iter(base.linears)).partition(".")[0] + "."
    linears = {module.removeprefix(prefix) for module in base.linears}
    names = {name.removeprefix(prefix): name for name in weights.names}
    weight = re.compile(r"(.+)\.weight(_scale|_scale_inv)?")
    return {
        short: name for short, name in names.items() if not ((match := weight.fullmatch(short)) and match[1] in linears)
    }


def _same(one: Iterator[torch.Tensor], other: Iterator[torch.Tensor]) -> bool:
    """Whether two tensors, in pieces, have the same shape and values, whatever their dtypes."""
    return all(
        a is not None and b is not None and a.shape == b.shape and bool((a == b).all())
        for a, b in itertools.zip_longest(one, other)
    )


def _statements(errors: Mapping[str, float]) -> Iterator[str]:
    """What whoever serves it has to know: the largest error, then those of all layers, a line for each kind of them."""
    worst = max(errors, key=lambda module: errors[module])
    yield (
        f"Extracted from merged weights: of what training changed, up to {errors[worst]:.3g} is lost (relative, "
        f"Frobenius; at {worst})."
    )
    kinds: dict[str, list[str]] = {}
    for module in sorted(errors, key=_in_order):
        layer = re.search(r"\.(\d+)\.", module)
        kind = module if layer is None else f"{module[: layer.start()]}.*.{module[layer.end() :]}"
        kinds.setdefault(kind, []).append(f"{layer[1] if layer else 'all'} {errors[module]:.2g}")
    for kind, each in sorted(kinds.items()):
        yield f"Error of {kind} by layer: {', '.join(each)}."


def _in_order(module: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]
