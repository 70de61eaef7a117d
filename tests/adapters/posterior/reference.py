"""Draws written down again from their formulas: whole numbers of Python, the standard library's quantile, float64.

It shares nothing with `loramux_adapters.posterior` but what a draw is defined to be.
"""

import hashlib
import json
from statistics import NormalDist

import numpy as np

STREAMS = {"a": 0, "b": 1, "scale": 2, "deviations": 3, "inputs": 4, "sketch_out": 5, "sketch_in": 6}
SKETCHES = 4
_MASK = 0xFFFFFFFF


def word(digest, seed, sample, module, stream, row, column, plane=0):
    """The 32 bits at one place."""
    name = json.dumps(["loramux draw", seed, digest, sample, module])
    k = [int.from_bytes(hashlib.sha256(name.encode()).digest()[i : i + 4], "little") for i in (0, 4)]
    c = [column // 4, row, plane, STREAMS[stream]]
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right & _MASK, (left >> 32) ^ c[3] ^ k[1], left & _MASK]
        k = [(k[0] + 0x9E3779B9) & _MASK, (k[1] + 0xBB67AE85) & _MASK]
    return c[column % 4]


class Reference:
    """The numbers of one sample, by place."""

    def __init__(self, digest, seed, sample):
        self.key = digest, seed, sample

    def words(self, module, stream, rows, columns, plane=0):
        return np.array([[word(*self.key, module, stream, i, j, plane) for j in range(columns)] for i in range(rows)])

    def normals(self, module, stream, rows, columns):
        quantile = np.vectorize(NormalDist().inv_cdf)
        return quantile((self.words(module, stream, rows, columns) + 0.5) / 2**32)

    def signs(self, module, stream, plane, columns):
        return np.where(self.words(module, stream, 1, columns, plane)[0] < 2**31, 1.0, -1.0)

    def delta(self, module, site):
        """ΔW [d_out, d_in] in float64 of a site in this sample; of the kinds' formulas nothing else is needed."""
        a, b, scale = (part.double().numpy() for part in (site.a, site.b, site.scale))
        kind, tensors = site.variance.kind.value, {
            name: tensor.double().numpy() for name, tensor in site.variance.tensors.items()
        }  # fmt: skip
        extra = 0.0
        if kind in ("diagonal_a", "diagonal_ab", "low_rank_diagonal"):
            a = a + tensors["sigma_a"] * self.normals(module, "a", *a.shape)
        if kind in ("diagonal_ab", "low_rank_diagonal"):
            b = b + tensors["sigma_b"] * self.normals(module, "b", *b.shape)
        if kind == "low_rank_diagonal":
            z = self.normals("", "deviations", 1, len(tensors["low_rank_a"]))[0]
            a, b = a + np.tensordot(z, tensors["low_rank_a"], 1), b + np.tensordot(z, tensors["low_rank_b"], 1)
        if kind == "rank_diagonal":
            scale = scale + tensors["sigma_scale"] * self.normals(module, "scale", 1, len(scale))[0]
        if kind == "ensemble":
            a, b, scale = (tensors[f"member_{name}"][self.key[2]] for name in ("a", "b", "scale"))
        if kind == "dropout":
            kept = self.words(module, "inputs", 1, a.shape[1])[0] >= round(site.variance.rate * 2**32)
            a = a * kept / (1 - site.variance.rate)
        if kind == "hierarchical":
            std = tensors["std_b"].T @ tensors["std_a"] + tensors["offset"]
            noise = sum(
                np.outer(
                    self.signs(module, "sketch_out", k, std.shape[0]), self.signs(module, "sketch_in", k, std.shape[1])
                )
                for k in range(SKETCHES)
            )
            extra = std * noise / SKETCHES**0.5
        rows = np.arange(len(b)) if site.arow is None else site.arow.numpy()
        return (b.T * scale) @ a[rows] + extra
