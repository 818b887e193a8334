"""Fused functions against torch's own, gradients too; on a GPU they are compiled."""

import threading

import pytest
import torch
from torch.nn import functional

from slope_megatron.layers.activation import activate
from slope_megatron.layers.fused import layer_norm, rms_norm, scale_
from slope_megatron.layers.token_losses import token_losses

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, WIDTH, VOCABULARY = 37, 96, 1000


def close(found, expected, exact):
    """Within twice of what the plain operations in the same type are off by (fp64: the exact ones)."""
    for ours, theirs, truth in zip(found, expected, exact, strict=True):
        bound = 2 * (theirs.double() - truth).abs().max() + 1e-12
        assert (ours.double() - truth).abs().max() <= bound


def with_gradients(function, tensors, gradient):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    y.backward(gradient.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def compare(device, ours, plain, shapes, shape_out):
    """bf16 on a GPU, fp32 on a CPU; the truth is the plain function in fp64."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tensors = [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]
    gradient = torch.randn(shape_out, device=device, generator=generator).to(dtype)
    exact = with_gradients(plain, [tensor.double() for tensor in tensors], gradient.double())
    close(with_gradients(ours, tensors, gradient), with_gradients(plain, tensors, gradient), exact)


@pytest.mark.parametrize("device", DEVICES)
def test_norms(device):
    shapes = [(TOKENS, WIDTH), (WIDTH,), (WIDTH,)]
    plain = functional.layer_norm
    compare(
        device, lambda x, w, b: layer_norm(x, w, b, 1e-5), lambda x, w, b: plain(x, (WIDTH,), w, b), shapes, shapes[0]
    )
    plain_rms = functional.rms_norm
    compare(
        device, lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: plain_rms(x, (WIDTH,), w, 1e-5), shapes[:2], shapes[0]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_bias_and_activation(device):
    for function in (functional.relu, functional.gelu):
        shapes = [(TOKENS, WIDTH), (WIDTH,)]
        compare(
            device,
            lambda x, b, f=function: activate(x, b, f, False),
            lambda x, b, f=function: f(x + b),
            shapes,
            shapes[0],
        )

    def gated(x):
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up

    shape = (TOKENS, 2 * WIDTH)
    compare(device, lambda x: activate(x, None, functional.silu, True), gated, [shape], (TOKENS, WIDTH))


@pytest.mark.parametrize("device", DEVICES)
def test_token_losses(device):
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device=device)

    def plain(logits):
        # Sums in fp32 at least, as every loss here.
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(wide, labels, reduction="none")

    def ours(logits):
        return token_losses(logits, labels)

    compare(device, ours, plain, [(TOKENS, VOCABULARY)], (TOKENS,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(TOKENS, WIDTH), (VOCABULARY,), (3, 1001)])
def test_a_scale_in_place(shape, dtype, device):
    """In fp32, then one rounding: to the bit."""
    x, factor = torch.randn(shape, device=device).to(dtype), torch.full((1,), 0.3, device=device)
    expected = (x.float() * factor).to(dtype)
    scale_(x, factor)
    assert torch.equal(x, expected)


@pytest.mark.gpu
def test_a_scale_past_2_to_31():
    x = torch.ones(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    scale_(x, torch.full((1,), 0.5, device="cuda"))
    assert (x[-4096:] == 0.5).all() and (x[:4096] == 0.5).all() and x.max() == 0.5


@pytest.mark.gpu
def test_many_shapes_stay_fused():
    from torch._dynamo.utils import counters

    def norms(shapes):
        for tokens in shapes:
            layer_norm(torch.randn(tokens, WIDTH, device="cuda"), *torch.ones(2, WIDTH, device="cuda"), 1e-5)

    before = counters["stats"]["unique_graphs"]
    norms(range(1, 11))
    # As backward does where it recomputes.
    thread = threading.Thread(target=norms, args=(range(11, 13),))
    thread.start()
    thread.join()
    assert counters["stats"]["unique_graphs"] - before == 12


def test_the_limit_of_variants_is_raised_in_each_thread():
    from torch._dynamo import config

    from slope_megatron.layers import fused

    seen = []

    def look():
        fused.allow_variants()
        seen.append(config.recompile_limit)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert seen == [fused.MOST_VARIANTS] * 2
