"""Kullback-Leibler divergences of normal laws with independent components, summed over all of them, in nats.

KL( N(m, s²) ‖ N(m', s'²) ) = Σ [ log(s'/s) + (s² + (m − m')²) / (2 s'²) − ½ ]
"""

import torch

_TINY = 1e-24


def kl(
    mean: torch.Tensor, std: torch.Tensor, to_mean: torch.Tensor | float, to_std: torch.Tensor | float
) -> torch.Tensor:
    """The sum over the components of [...] tensors. The sign of a deviation does not matter; at 0 it is finite, but
    large: log 10¹² for each."""
    variance, to_variance = std.square() + _TINY, torch.as_tensor(to_std).square() + _TINY
    ratio = variance / to_variance
    moved = (mean - to_mean).square() / to_variance
    return 0.5 * (ratio - ratio.log() - 1 + moved).sum()
