"""amax and quantize against `sparsity.float8`: equal to the bit, on poisoned outputs."""

import pytest
import torch

from slope_megatron.sparsity import float8

DTYPES = [torch.bfloat16, torch.float16]
POISON = 0x55


def quantized(x, padded, device, rows=True, columns=True):
    """Both copies (None where not wanted) and the scale; small blocks, several steps of three programs."""
    from slope_kernels.triton import quantize

    amax = torch.zeros(1, dtype=torch.int32, device=device)
    quantize.amax_bits(x, amax, programs=3, block=64)
    copies = [
        torch.full(shape, POISON, dtype=torch.uint8, device=device) if wanted else None
        for shape, wanted in (((padded, x.shape[1]), rows), ((x.shape[1], padded), columns))
    ]
    scale = torch.full((1,), 7.0, device=device)
    quantize.quantize(x, amax, scale, *copies, blocks=(32, 64, 4))
    return *copies, scale[0]


def expected(x, padded):
    q, scale = float8.quantize(x)
    return torch.nn.functional.pad(q.view(torch.uint8), (0, 0, 0, padded - x.shape[0])), scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "padded"), [(64, 64, 64), (50, 72, 64), (7, 40, 16)])
@pytest.mark.parametrize("std", [1.0, 1e-5, 300.0])
def test_both_copies_and_the_scale(tokens, width, padded, dtype, std, device):
    generator = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, width, generator=generator) * std).to(dtype).to(device)
    rows, columns, scale = quantized(x, padded, device)
    q, expected_scale = expected(x, padded)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(rows, q)
    assert torch.equal(columns, q.t())


@pytest.mark.parametrize("more", [-1, 0, 1, 4, 5])
def test_an_aimed_scale(more, device):
    """Taken where it is at most SLACK binades more than the smallest."""
    from slope_kernels.triton import quantize

    x = torch.randn(32, 64, device=device).to(torch.bfloat16)
    smallest, partner = float8.scale_of(x.abs().amax()), torch.full((1,), 2.0**-7, device=device)
    target = round(float((smallest * partner[0]).log2())) + more
    amax = torch.zeros(1, dtype=torch.int32, device=device)
    quantize.amax_bits(x, amax, programs=3, block=64)
    rows, scale = torch.empty(32, 64, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    quantize.quantize(x, amax, scale, rows, None, partner=partner, target=target, blocks=(32, 64, 4))
    assert float(scale) == float(float8.aimed(smallest, partner[0], target))
    assert float(scale) == float(smallest) * (2.0**more if 0 <= more <= 4 else 1.0)
    assert torch.equal(rows, float8.quantize(x, scale[0])[0].view(torch.uint8))


@pytest.mark.parametrize("wanted", ["rows", "columns"])
def test_one_copy_alone(wanted, device):
    x = torch.randn(48, 64, device=device).to(torch.bfloat16)
    rows, columns, _ = quantized(x, 48, device, rows=wanted == "rows", columns=wanted == "columns")
    found = rows if wanted == "rows" else columns.t()
    assert torch.equal(found, expected(x, 48)[0])


def test_no_copy_is_refused(device):
    with pytest.raises(ValueError, match="rows and columns are both None: one at least must be there"):
        quantized(torch.ones(32, 64, device=device, dtype=torch.bfloat16), 32, device, rows=False, columns=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_value_with_the_largest_scale_and_the_smallest(dtype, device):
    """All finite bit patterns (a share in the interpreter), then those alone that are small, subnormals among them."""
    every = 1 if device == "cuda" else 19
    everything = torch.arange(0, 1 << 16, every, dtype=torch.int32).to(torch.uint16).view(dtype)
    everything = everything[everything.float().isfinite()].to(device)
    for x in (everything, everything[everything.abs() < 1e-4], torch.zeros(64, dtype=dtype, device=device)):
        x = x[: x.numel() // 16 * 16].view(-1, 16)
        rows, _, scale = quantized(x, x.shape[0] + -x.shape[0] % 16, device, columns=False)
        q, expected_scale = expected(x, rows.shape[0])
        assert torch.equal(scale, expected_scale)
        assert torch.equal(rows, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_spoils_the_whole_matrix(dtype, value, device):
    x = torch.randn(32, 64, device=device).to(dtype)
    x[3, 5] = value
    rows, columns, scale = quantized(x, 32, device)
    assert ((rows & 0x7F) == 0x7F).all()
    assert ((columns & 0x7F) == 0x7F).all()
    assert scale.isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(16, 64), (7, 24)])
def test_rescale(shape, biased, dtype, device):
    """Whole numbers: the interpreter does not round as a GPU does."""
    from slope_kernels.triton.quantize import rescale

    y = torch.randint(-50, 51, shape, device=device).to(dtype)
    bias = torch.randint(-50, 51, shape[1:], device=device).to(dtype) if biased else None
    scales = torch.tensor([2.0**-9, 2.0**7, float("nan")], device=device)
    found = y.clone()
    rescale(found, scales[:1], scales[1:2], 8.0, bias, block=256)
    assert torch.equal(found, y * 2 + bias if biased else y * 2)
    rescale(found, scales[:1], scales[2:], 8.0, bias, block=256)
    assert found.isnan().all()
    found = y.clone()
    rescale(found, scales[:1], scales[1:2], 4.0, bias, block=256)
    assert torch.equal(found, y + bias if biased else y)


@pytest.mark.gpu
def test_large_offsets(device):
    """More than 2^31 elements: offsets are 64-bit."""
    x = torch.zeros(70_000, 32_768, dtype=torch.bfloat16, device=device)
    x[-1, -64:] = torch.randn(64, device=device)
    rows, columns, _ = quantized(x, 70_000, device)
    q, _ = float8.quantize(x[-1:])
    assert torch.equal(rows[-1:], q.view(torch.uint8))
    assert torch.equal(columns[:, -1], q[0].view(torch.uint8))
