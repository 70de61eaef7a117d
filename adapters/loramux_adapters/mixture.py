"""Several LoRAs at one site, in the one form: mixtures of experts with a gate, and sums.

    Δy_t = Σ_e g_e(x_t) · s_e · B_e · A_e · x_t        A_e [r_e, d_in]   B_e [d_out, r_e]   g(x_t) [E], 1 for a sum

The rank rows of all experts are stacked in expert order: R = Σ r_e, and expert[j] is the expert that rank j belongs to.
An A that all experts share is stored once: then arow[j] is the row of `a` that rank j reads.
"""

from collections.abc import Sequence

import torch

from loramux_adapters.lowered import LoweredSite


def token_site(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], gate: str
) -> LoweredSite:
    """A site from E experts.

    a       E tensors A_e [r_e, d_in], or one [r, d_in] that all experts share
    b       E tensors B_e [d_out, r_e]
    scales  E tensors [r_e] float32, a scale per rank
    gate    name of the gate among the adapter's gates; it must give E values

    Experts stored in different dtypes meet in the one that holds both exactly.
    """
    ranks = torch.tensor([part.shape[1] for part in b])
    shared = len(a) < len(b)
    return LoweredSite(
        a=torch.cat(list(a)),
        b=torch.cat([part.T for part in b]),
        scale=torch.cat(list(scales)),
        gate=gate,
        expert=torch.repeat_interleave(torch.arange(len(b), dtype=torch.int32), ranks),
        arow=torch.arange(len(a[0]), dtype=torch.int32).repeat(len(b)) if shared else None,
    )


def summed_site(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> LoweredSite:
    """A site from LoRAs that add up: one of rank Σ r_e. The arguments are `token_site`'s, with an A for each B."""
    return LoweredSite(torch.cat(list(a)), torch.cat([part.T for part in b]), torch.cat(list(scales)))
