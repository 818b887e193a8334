"""The operand of P(dY)^T against its plain-torch reference: equal to the bit, on poisoned outputs."""

import pytest
import torch

from slope_megatron.sparsity.mvue24 import two_of_four
from slope_megatron.sparsity.mvue_rng import MvueRng, as_int32, stream_table
from slope_megatron.sparsity.operand import metadata_sm90
from slope_megatron.sparsity.operand_cutlass import metadata_cutlass

POISON = 0xAB


def gradient(tokens, rows, dtype, seed):
    """Numbers of many sizes: zeros, subnormal and huge ones among them, an infinity and a NaN."""
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(tokens, rows, generator=generator)
    dy *= torch.exp(2.0 * torch.randn(tokens, rows, generator=generator))
    dy[:, ::5] *= torch.rand(tokens, len(range(0, rows, 5)), generator=generator) < 0.4
    smallest, largest = (1e-38, 1e38) if dtype == torch.bfloat16 else (1e-6, 5e3)
    dy[:, 1] *= smallest
    dy[:, 2] *= largest
    dy[5, 7], dy[9, 11] = float("nan"), float("inf")
    return dy.to(dtype)


def rng_of(rows, device, seed):
    """Two parts, as gate and up are, cut out of larger weights."""
    half = rows // 2
    names = [(0x80000001 + seed, 5), (7, 0xFFFFFFFF)]
    streams = stream_table(names, [range(1000, 1000 + half), range(3 * half, 4 * half)])
    key = as_int32([0x9E3779B9, seed])
    return MvueRng(key.to(device), streams.to(device), 2, 4)


def reference(dy, rng, columns, order=metadata_sm90):
    """Values [N, S/2] and metadata."""
    groups = -(-dy.shape[0] // 4)
    words = torch.nn.functional.pad(rng.words(groups), (0, columns // 4 - groups))
    values, indices = two_of_four(torch.nn.functional.pad(dy.t(), (0, columns - dy.shape[0])), words)
    return values, order(indices)


def written(dy, rng, columns, order=metadata_sm90):
    from slope_kernels.triton.mvue import mvue_operand

    rows = dy.shape[1]
    operand = torch.full((rows * columns * 9 // 8,), POISON, dtype=torch.uint8, device=dy.device)
    mvue_operand(dy, rng.key, rng.streams, operand, for_cutlass=order is metadata_cutlass)
    return operand[: rows * columns].view(dy.dtype).view(rows, -1), operand[rows * columns :]


def same(found, expected):
    """Equal as bits; one NaN is as good as another."""
    return bool(((found.view(torch.int16) == expected.view(torch.int16)) | (found.isnan() & expected.isnan())).all())


ORDERS = pytest.mark.parametrize("order", [metadata_sm90, metadata_cutlass])


@ORDERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "rows"), [(128, 128), (37, 64)])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_operand_equals_its_twin(tokens, rows, dtype, order, device):
    """Tokens that fill the programs, and 37, which do not and whose words do not come in whole blocks of four."""
    dy, rng = gradient(tokens, rows, dtype, seed=tokens).to(device), rng_of(rows, device, seed=rows)
    columns = tokens + -tokens % 64
    values, metadata = written(dy, rng, columns, order)
    expected, expected_metadata = reference(dy, rng, columns, order)
    assert same(values, expected) and values.isnan().any()
    assert torch.equal(metadata, expected_metadata)


@pytest.mark.gpu
@ORDERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "rows"), [(4096, 2560), (777, 192), (8192, 7680), (2048, 64), (16, 4096), (3, 64)])
def test_operand_equals_its_twin_on_the_gpu(tokens, rows, dtype, order, device):
    dy, rng = gradient(max(tokens, 16), rows, dtype, seed=tokens)[:tokens].to(device), rng_of(rows, device, seed=1)
    columns = tokens + -tokens % 64
    values, metadata = written(dy, rng, columns, order)
    expected, expected_metadata = reference(dy, rng, columns, order)
    assert same(values, expected)
    assert torch.equal(metadata, expected_metadata)


@pytest.mark.gpu
def test_more_elements_than_a_32_bit_index_holds(device):
    """2^31 + 2^23 elements: the last rows, whose offsets would have wrapped, against those rows alone."""
    tokens, rows, last = 32896, 65536, 64
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    dy = torch.randn(tokens, rows, device=device, dtype=torch.bfloat16)
    rng = rng_of(rows, device, seed=2)
    values, metadata = written(dy, rng, tokens)
    tail = MvueRng(rng.key, rng.streams[:, :, -last // 2 :].contiguous(), 2, 4)
    expected, expected_metadata = reference(dy[:, -last:].contiguous(), tail, tokens)
    assert same(values[-last:], expected)
    assert torch.equal(metadata[-expected_metadata.numel() :], expected_metadata)
