"""The numbers of a draw: the same in any order and in any pieces, and other ones for all that must differ."""

import itertools

import pytest
import torch

from loramux_adapters.posterior.noise import Noise, Stream

ROWS, COLUMNS = range(13), range(101)


def normals(seed=0, digest="d", sample=0, module="m", stream=Stream.A, rows=ROWS, columns=COLUMNS):
    return Noise(digest, seed, sample).normals(module, stream, rows, columns)


@pytest.mark.parametrize("cuts", [(13, 101), (1, 1), (5, 4), (4, 7), (13, 50)])
def test_pieces_make_the_whole(cuts):
    height, width = cuts
    whole = normals()
    pieces = [
        torch.cat([normals(rows=ROWS[i : i + height], columns=COLUMNS[j : j + width]) for j in COLUMNS[::width]], 1)
        for i in ROWS[::height]
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_large_ones_are_made_in_pieces_too():
    large = normals(rows=range(40), columns=range(3001))
    assert torch.equal(large[37:], normals(rows=range(37, 40), columns=range(3001)))
    assert torch.equal(normals(rows=range(2), columns=range(70_000))[:, 69_999:], normals(
        rows=range(2), columns=range(69_999, 70_000)
    ))  # fmt: skip


def test_whatever_differs_gives_other_numbers():
    changes = [{}, {"seed": 1}, {"digest": "e"}, {"sample": 1}, {"module": "n"}, {"stream": Stream.B}]
    for one, other in itertools.combinations([normals(**change).flatten() for change in changes], 2):
        assert not (one == other).any()
        # The correlation of n independent pairs has a standard deviation of 1/√n.
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 5 / len(one) ** 0.5


def test_names_do_not_run_together():
    assert not (normals(digest="a", module="bc") == normals(digest="ab", module="c")).any()
    assert not (normals(seed=1, sample=11) == normals(seed=11, sample=1)).any()


def test_their_moments_are_a_normal_s():
    """Mean, variance and fourth moment within 5 standard errors, and no correlation of neighbours."""
    z = normals(rows=range(400), columns=range(1000)).double()
    n = z.numel()
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs(z.pow(power).mean() - expected) < 5 * (spread / n) ** 0.5
    for shift in (1, 2, 3, 4):
        assert abs((z[:, shift:] * z[:, :-shift]).mean()) < 5 / n**0.5
        assert abs((z[shift:] * z[:-shift]).mean()) < 5 / n**0.5


def test_signs_and_masks_have_their_chances():
    noise, n = Noise("d", 0, 0), 100_000
    signs = noise.signs("m", Stream.SKETCH_IN, 0, range(n))
    assert set(signs.tolist()) == {1.0, -1.0} and abs(signs.mean()) < 5 / n**0.5
    assert not torch.equal(signs, noise.signs("m", Stream.SKETCH_IN, 1, range(n)))
    for rate in (0.05, 0.5, 0.9):
        kept = noise.kept("m", rate, range(n))
        assert set(kept.tolist()) == {0.0, 1.0}
        assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / n) ** 0.5
    assert noise.kept("m", 1 - 2**-40, range(9)).sum() == 0
