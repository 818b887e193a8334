"""The gradient of gated activations against autograd in fp64: no farther off than the one rounding."""

import pytest
import torch
from torch.nn import functional

FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
}
# fp32: sums and products of a few rounded factors. Triton's interpreter cuts bf16 off where GPUs round it.
UNITS = {torch.float32: 8, torch.float16: 0.51, torch.bfloat16: 0.51 if torch.cuda.is_available() else 1.01}


def exact(dy, x, bias, activation):
    """In fp64, and the largest of what was added up for each number."""
    leaf = (x.double() if bias is None else x.double() + bias.double()).requires_grad_()
    gate, up = leaf.chunk(2, -1)
    (FUNCTIONS[activation](gate) * up).backward(dy.double())
    slope = torch.cat((dy.double() * up, dy.double() * gate), -1)
    return leaf.grad, slope.detach().abs()


def written(dy, x, bias, activation):
    """By the kernel, on a poisoned output."""
    from slope_kernels.triton import gated_activation

    found = torch.full_like(x, 777.0)
    gated_activation.gradient(dy, x, bias, found, activation)
    return found


def check(found, dy, x, bias, activation):
    truth, largest = exact(dy, x, bias, activation)
    rounding = torch.finfo(found.dtype).eps * UNITS[found.dtype] * truth.abs()
    # fp32 inside: (s + g s') may be a small difference, and so may x + b.
    inside = 2e-6 * largest + torch.finfo(found.dtype).smallest_normal
    assert ((found.double() - truth).abs() <= rounding + inside).all()


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize(("tokens", "width"), [(5, 96), (3, 1024), (2, 1543), (1, 1)])
def test_both_halves(tokens, width, activation, biased, dtype, device):
    dy, x = (torch.randn(tokens, columns).mul(2).to(dtype).to(device) for columns in (width, 2 * width))
    bias = torch.randn(2 * width).to(dtype).to(device) if biased else None
    check(written(dy, x, bias, activation), dy, x, bias, activation)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_extreme_gates(activation, device):
    """Where the exponential is infinite or 0, and what is not finite stays visible."""
    gate = torch.tensor([0.0, -0.0, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4, 1e-30, -1e-30], device=device)
    x = torch.cat((gate, torch.linspace(-2, 2, 10, device=device)))[None]
    dy = torch.full((1, 10), 3.0, device=device)
    check(written(dy, x, None, activation), dy, x, None, activation)
    x[0, 3] = dy[0, 5] = torch.nan
    found = written(dy, x, None, activation)
    assert torch.equal(found.isnan().nonzero()[:, 1].cpu(), torch.tensor([3, 5, 13, 15]))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_a_model_s_size(activation, biased, device):
    """Through autograd, in bf16 and beside the compiled forward; the bias's gradient, too."""
    from slope_megatron.layers.activation import activate
    from slope_megatron.ops.custom_ops.gated_activation import ACTIVATIONS

    x = torch.randn(2048, 2, 2 * 3584, device=device).to(torch.bfloat16).requires_grad_()
    bias = torch.randn(2 * 3584, device=device).to(torch.bfloat16).requires_grad_() if biased else None
    y = activate(x, bias, ACTIVATIONS[activation][0], True)
    assert type(y.grad_fn).__name__ == "GatedActivationBackward"
    dy = torch.randn_like(y)
    y.backward(dy)
    rows = x.grad.flatten(0, 1)
    check(rows, dy.flatten(0, 1), x.detach().flatten(0, 1), None if bias is None else bias.detach(), activation)
    if bias is not None:
        # One rounding of the sum, and one of each of its 4096 terms.
        terms = exact(dy.flatten(0, 1), x.detach().flatten(0, 1), bias.detach(), activation)[0]
        bound = torch.finfo(bias.dtype).eps * (terms.sum(0).abs() + terms.square().sum(0).sqrt() * 3)
        assert ((bias.grad.double() - terms.sum(0)).abs() <= bound).all()


@pytest.mark.gpu
def test_large_offsets(device):
    """More than 2^31 numbers: offsets are 64-bit."""
    x = torch.zeros(70_000, 32_768, dtype=torch.bfloat16, device=device)
    dy = torch.zeros(70_000, 16_384, dtype=torch.bfloat16, device=device)
    x[-1], dy[-1] = torch.randn(32_768, device=device), torch.randn(16_384, device=device)
    found = written(dy, x, None, "silu")
    check(found[-1:], dy[-1:], x[-1:], None, "silu")
    assert not found[:-1].any()
