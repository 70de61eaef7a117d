"""The GGUF reader against an independent encoder, and against files that lie."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.bases.gguf import GGUF, GGUFError


@pytest.fixture(scope="module")
def sample(encode):
    rng = np.random.default_rng(1)
    keys = {"general.name": "Müsli", "n": 7, "x": 0.5, "yes": True, "words": ["a", "", "b c"], "numbers": [-1, 2]}
    tensors = {
        "one": (rng.standard_normal((3, 5)), "F32"),
        "two": (rng.standard_normal((4, 64)), "Q4_1"),
        "three": (rng.standard_normal((2, 3, 32)), "Q8_0"),
    }
    return keys, tensors, encode(keys, tensors)


def test_keys_and_shapes_come_back(sample):
    keys, tensors, data = sample
    gguf = GGUF(data)
    assert gguf.keys == keys
    assert {name: info.shape for name, info in gguf.tensors.items()} == {n: a.shape for n, (a, _) in tensors.items()}


def test_float32_is_exact(sample):
    _, tensors, data = sample
    np.testing.assert_array_equal(GGUF(data).tensor("one"), tensors["one"][0].astype(np.float32))


@pytest.mark.parametrize(("name", "steps"), [("two", 15), ("three", 127)])
def test_quantised_weights_are_within_half_a_step(sample, name, steps):
    """Half a step from rounding the level, plus what rounding step and minimum to float16 (2^-11) costs."""
    _, tensors, data = sample
    blocks = tensors[name][0].reshape(-1, 32)
    read = GGUF(data).tensor(name).reshape(-1, 32)
    span = np.ptp(blocks, axis=1) if name == "two" else np.abs(blocks).max(axis=1)
    bound = span / steps / 2 + 2**-11 * (span + np.abs(blocks).max(axis=1))
    assert (np.abs(read - blocks).max(axis=1) <= bound).all()


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        ("Q4_1", [0.25 * (i % 16) - 3 for i in range(32)]),
        ("Q4_1", [1.5] * 32),
        ("Q8_0", [0.5 * (8 * i - 127) for i in range(32)]),
        ("Q8_0", [0.0] * 32),
    ],
)
def test_representable_weights_are_exact(encode, kind, block):
    weights = np.array([block, block[::-1]])
    np.testing.assert_array_equal(GGUF(encode({}, {"w": (weights, kind)})).tensor("w"), weights)


def test_alignment_is_read_from_the_file(encode):
    weights = np.arange(3.0)
    data = encode({"general.alignment": 4096}, {"pad": (weights, "F32"), "w": (weights, "F32")})
    assert GGUF(data).tensors["w"].start == 8192
    np.testing.assert_array_equal(GGUF(data).tensor("w"), weights)


def test_every_cut_is_noticed(sample):
    _, _, data = sample
    for length in range(len(data)):
        with pytest.raises(GGUFError):
            GGUF(data[:length])


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_gives_a_file_or_a_clear_error(sample, place, byte):
    data = bytearray(sample[2])
    data[place % len(data)] = byte
    try:
        gguf = GGUF(bytes(data))
    except GGUFError:
        return
    with np.errstate(all="ignore"):
        for name, info in gguf.tensors.items():
            assert gguf.tensor(name).shape == info.shape


def _key(name: bytes, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(name)) + name + rest


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 2, 0, 0), "version 2"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "the name of key 0"),
        (_key(b"k", struct.pack("<I", 99)), "'k' has unknown value type 99"),
        (_key(b"k", struct.pack("<IIQ", 9, 4, 2**60)), "'k' needs"),
        (_key(b"k", struct.pack("<IIQ", 9, 9, 1)), "'k' is an array of value type 9"),
        (_key(b"k", struct.pack("<IQ", 8, 2**63)), "'k' needs"),
        (_key(b"k", struct.pack("<IQ", 8, 1) + b"\xff"), "'k' is not UTF-8"),
    ],
)
def test_lies_in_the_header_are_named(data, words):
    with pytest.raises(GGUFError, match=words):
        GGUF(data)


@pytest.mark.parametrize(
    ("array", "kind", "words"),
    [
        (np.zeros((1, 256)), "Q4_K", "'w' has type 12; supported are"),
        (np.zeros((2, 16)), "Q8_0", r"'w' has sizes \[16, 2\]"),
        (np.zeros((0, 32)), "F32", r"'w' has sizes \[32, 0\]"),
        (np.zeros((1, 1, 1, 1, 1)), "F32", "'w' has 5 dimensions"),
    ],
)
def test_tensors_we_cannot_read_are_named(encode, array, kind, words):
    with pytest.raises(GGUFError, match=words):
        GGUF(encode({}, {"w": (array, kind)}))


def test_a_key_twice_is_refused():
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 1)
    with pytest.raises(GGUFError, match="key 'k' appears twice"):
        GGUF(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + key + key)
