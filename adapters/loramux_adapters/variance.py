"""A posterior over a site's weights: what changes from one sample of a Bayesian adapter to the next.

In all of them z, z' and z_k are independent standard normals, drawn once per sample, and every σ is a standard
deviation, whatever map (square, softplus, exp) training used. Which numbers a sample draws is `posterior/noise.py`'s.

    diagonal_a          a + sigma_a ⊙ z                        BLoB arXiv 2406.11675, TFB 2412.05723
    diagonal_ab         also b + sigma_b ⊙ z'                  IVON-LoRA 2411.04421
    rank_diagonal       scale + sigma_scale ⊙ z                ScalaBL 2506.21408
    low_rank_diagonal   a + sigma_a ⊙ z + Σ_k z_k low_rank_a[k]; b likewise; the z_k are the same at a and b and at all
                        sites                                  SWAG-LoRA 2405.03425
    ensemble            sample s: member_a[s], member_b[s], member_scale[s] instead of a, b, scale  2310.00035
    dropout             a[:, i] · m_i / (1 − rate), m_i ~ Bernoulli(1 − rate) per input of the site
    hierarchical        ΔW + S ⊙ z with S[o, i] = form(Σ_j std_b[j, o] std_a[j, i] + offset)        ABMLL 2508.14285
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch


class VarianceKind(StrEnum):
    DIAGONAL_A = "diagonal_a"
    DIAGONAL_AB = "diagonal_ab"
    RANK_DIAGONAL = "rank_diagonal"
    LOW_RANK_DIAGONAL = "low_rank_diagonal"
    ENSEMBLE = "ensemble"
    DROPOUT = "dropout"
    HIERARCHICAL = "hierarchical"


class VarianceForm(StrEnum):
    """How HIERARCHICAL makes a standard deviation of a low-rank product."""

    LINEAR = "linear"
    SOFTPLUS = "softplus"
    EXP = "exp"


@dataclass(frozen=True, eq=False)
class Variance:
    """`tensors` by the names in the module's docstring, with the shapes in `SHAPES`; `rate` in (0, 1) for DROPOUT."""

    kind: VarianceKind
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rate: float | None = None
    form: VarianceForm = VarianceForm.LINEAR


STANDARD_DEVIATIONS = ("sigma_a", "sigma_b", "sigma_scale")
"""What may not be negative. (S of HIERARCHICAL may: S ⊙ z has the law of |S| ⊙ z.)"""

SCALES = ("sigma_scale", "member_scale")
"""What belongs to a rank's scale: a factor of that is one of these, too."""

# Axes: Ra rows of a, R ranks, I = d_in, O = d_out; K (deviations), S (members) and V (rank of the standard deviation)
# are free but at least 1. An axis has one length in all tensors of a site.
SHAPES: Mapping[VarianceKind, Mapping[str, tuple[str, ...]]] = {
    VarianceKind.DIAGONAL_A: {"sigma_a": ("Ra", "I")},
    VarianceKind.DIAGONAL_AB: {"sigma_a": ("Ra", "I"), "sigma_b": ("R", "O")},
    VarianceKind.RANK_DIAGONAL: {"sigma_scale": ("R",)},
    VarianceKind.LOW_RANK_DIAGONAL: {
        "sigma_a": ("Ra", "I"),
        "sigma_b": ("R", "O"),
        "low_rank_a": ("K", "Ra", "I"),
        "low_rank_b": ("K", "R", "O"),
    },
    VarianceKind.ENSEMBLE: {"member_a": ("S", "Ra", "I"), "member_b": ("S", "R", "O"), "member_scale": ("S", "R")},
    VarianceKind.DROPOUT: {},
    VarianceKind.HIERARCHICAL: {"std_a": ("V", "I"), "std_b": ("V", "O"), "offset": ("1",)},
}
