"""The counter generator: known answers, independence of how a tensor is cut, and the right distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_megatron.sparsity import counter

# Known answers of Philox4x32 (Random123's kat_vectors): rounds, counter and key -> output.
ONES = 0xFFFFFFFF
ZEROS, FULL = ((0, 0, 0, 0), (0, 0)), ((ONES, ONES, ONES, ONES), (ONES, ONES))
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
KNOWN = [
    (7, *ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, *FULL, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, *ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, *FULL, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "words", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(rounds, words, key, expected):
    block = words[0] | words[1] << 32
    # The int64 of the same bits.
    block = torch.tensor([block - 2**64 if block >= 2**63 else block])
    assert tuple(counter.philox(key, block, words[2:], rounds)[0].tolist()) == expected


def python_philox(key, block, stream):
    """Philox4x32-10 with Python's unbounded integers: no wrap-around to get wrong."""
    c = [block & 0xFFFFFFFF, block >> 32, *stream]
    k = list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@given(
    key=st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
    stream=st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
    blocks=st.lists(st.integers(0, 2**62), min_size=1, max_size=8),
)
@settings(deadline=None, max_examples=50)
def test_philox_equals_unbounded_arithmetic(key, stream, blocks):
    found = counter.philox(key, torch.tensor(blocks), stream)
    assert found.tolist() == [python_philox(key, block, stream) for block in blocks]


@pytest.mark.parametrize("function", [counter.bits, counter.normal])
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_cut_tensor_holds_the_numbers_of_the_whole(function, data):
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 24))
    top = data.draw(st.integers(0, rows - 1))
    bottom = data.draw(st.integers(top + 1, rows))
    left = data.draw(st.integers(0, columns - 1))
    right = data.draw(st.integers(left + 1, columns))
    key = counter.key_of(7, "layer")
    whole = function(key, range(rows), range(columns), columns)
    part = function(key, range(top, bottom), range(left, right), columns)
    assert torch.equal(part, whole[top:bottom, left:right])


def test_names_and_seeds_give_other_numbers():
    keys = {counter.key_of(seed, name) for seed in (0, 1) for name in ("a", "b", "a_pattern")}
    assert len(keys) == 6


def test_normals_have_the_moments_of_a_normal():
    sample = counter.normal(counter.key_of(3, "moments"), range(1000), range(1000), 1000).double()
    # Five standard errors at n = 1e6: of the mean 1e-3, the variance sqrt(2/n) = 1.4e-3, the fourth moment 1e-2.
    assert abs(sample.mean()) < 5e-3
    assert abs(sample.var() - 1) < 7e-3
    assert abs(sample.pow(4).mean() - 3) < 5e-2
    assert abs((sample.flatten()[:-1] * sample.flatten()[1:]).mean()) < 5e-3
    beyond_two = (sample.abs() > 2).double().mean()
    assert abs(beyond_two - math.erfc(2 / math.sqrt(2))) < 2e-3
