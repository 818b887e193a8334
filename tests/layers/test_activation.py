"""The gated activation whose backward is an op of its own, against plain autograd; on a CPU the op is plain torch."""

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from slope_megatron.layers.activation import GatedActivation, activate, fused_activation
from slope_megatron.ops.custom_ops import gated_activation

TOKENS, WIDTH = (5, 3), 24
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = list(gated_activation.ACTIVATIONS)


def inputs(biased, device, dtype=torch.float32):
    x = torch.randn(*TOKENS, 2 * WIDTH, device=device).to(dtype).requires_grad_()
    bias = torch.randn(2 * WIDTH, device=device).to(dtype).requires_grad_() if biased else None
    return x, bias, torch.randn(*TOKENS, WIDTH, device=device).to(dtype)


def gradients(y, dy, *inputs):
    return torch.autograd.grad(y, [tensor for tensor in inputs if tensor is not None], dy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients_are_those_of_the_plain_form(name, biased, device):
    x, bias, dy = inputs(biased, device)
    function = gated_activation.ACTIVATIONS[name][0]
    y, plain = GatedActivation.apply(x, bias, function, name), fused_activation(x, bias, function, True)
    assert torch.equal(y, plain)
    found, expected = gradients(y, dy, x, bias), gradients(plain, dy, x, bias)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_recomputation_gives_the_same_bits(biased, device):
    x, bias, dy = inputs(biased, device)

    def call(x, bias):
        return GatedActivation.apply(x, bias, functional.silu, "silu")

    kept = gradients(call(x, bias), dy, x, bias)
    again = gradients(checkpoint(call, x, bias, use_reentrant=False), dy, x, bias)
    assert all(torch.equal(*pair) for pair in zip(kept, again, strict=True))


def test_its_input_alone_is_kept():
    x, bias, _ = inputs(True, "cpu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        GatedActivation.apply(x, bias, functional.silu, "silu")
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), bias.data_ptr()]


def test_a_gradient_with_gaps_in_memory():
    x, bias, dy = inputs(True, "cpu")
    apart = torch.stack((dy, dy), -1)[..., 0]
    pairs = (gradients(GatedActivation.apply(x, bias, functional.silu, "silu"), d, x, bias) for d in (dy, apart))
    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, biased, device):
    x, bias, dy = inputs(biased, device)
    arguments = (dy.flatten(0, 1), x.detach().flatten(0, 1), None if bias is None else bias.detach(), name)
    torch.library.opcheck(torch.ops.slope.gated_activation_gradient.default, arguments)


@pytest.mark.slow
def test_a_compiled_region_may_hold_it(monkeypatch):
    from torch._dynamo import config

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    x, bias, dy = inputs(True, "cpu")

    def call(x, bias):
        return GatedActivation.apply(x * 2, bias, functional.silu, "silu") + 1

    # What is set in it and undone by pytest is gone from it.
    with config.patch(disable=False):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        pairs = [gradients(function(x, bias), dy, x, bias) for function in (compiled, call)]
    assert all(torch.allclose(*pair) for pair in zip(*pairs, strict=True))


def test_which_activations_have_a_kernel():
    from slope_megatron.models.provider import ACTIVATIONS

    named = {name: gated_activation.name_of(function) for name, function in ACTIVATIONS.items()}
    assert named == {"relu": None, "gelu": "gelu", "gelu_tanh": "gelu_tanh", "silu": "silu"}
    assert gated_activation.name_of(lambda x: x) is None


def test_on_a_cpu_the_plain_form_stays():
    x, bias, _ = inputs(True, "cpu")
    assert type(activate(x, bias, functional.silu, True).grad_fn).__name__ == "MulBackward0"
