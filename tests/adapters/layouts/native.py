"""A mixture in the native format, written from its specification in adapters/README.md, with torch and JSON alone."""

import json

import torch

from ..checkpoints import BASE
from ..mixture_reference import mixture_delta
from .draw import draw

RANKS, SCALE, TOP_K = [1, 2, 4], 0.1, 2


def make_metadata(modules):
    sites = {module: {"rank": sum(RANKS), "gate": module, "tensors": ["expert"]} for module in modules}
    gates = {module: {"select": "top_k", "k": TOP_K} for module in modules}
    head = {"format": "loramux", "version": 1, "method": "mola", "base": "somebody/tiny"}
    return {"loramux": json.dumps(head | {"sites": sites, "gates": gates})}


def make_tensors(modules, base=BASE, dtype=torch.float32, seed=0):
    shapes, rank = {}, sum(RANKS)
    for module in modules:
        d_in, d_out = base.linears[module]
        shapes |= {f"{module}.A": (rank, d_in), f"gate:{module}.weights": (len(RANKS), d_in)}
        shapes[f"{module}.B"] = (rank, d_out)
    tensors = {name: t * (20 if name.endswith(".B") else 1) for name, t in draw(shapes, dtype, seed).items()}
    for module in modules:
        tensors[f"{module}.scale"] = torch.full((rank,), SCALE)
        tensors[f"{module}.expert"] = torch.tensor(
            [e for e, r in enumerate(RANKS) for _ in range(r)], dtype=torch.int32
        )
    return tensors


def delta(tensors, module, x):
    a, b = tensors[f"{module}.A"].split(RANKS), tensors[f"{module}.B"].split(RANKS)
    router = tensors[f"gate:{module}.weights"]
    return mixture_delta(x, router, a, [part.T for part in b], [SCALE] * len(RANKS), TOP_K)
