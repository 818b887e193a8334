"""The registered ops of a loss: schemas and fakes (opcheck), and what they give against torch's own cross-entropy."""

import pytest
import torch
from torch.nn import functional

from slope_megatron.layers.token_losses import token_losses
from slope_megatron.ops.custom_ops import cross_entropy

TOKENS, VOCABULARY = 5, 48
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def problem(device, dtype):
    logits = torch.randn(TOKENS, VOCABULARY, device=device).mul(4).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device=device)
    wide = torch.promote_types(dtype, torch.float32)
    return logits, labels, torch.rand(TOKENS, device=device, dtype=wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["label_statistics", "logit_gradient", "logit_gradient_"])
def test_opcheck(name, dtype, device):
    logits, labels, weight = problem(device, dtype)
    more = () if name == "label_statistics" else (logits.to(weight.dtype).logsumexp(-1), weight)
    torch.library.opcheck(getattr(torch.ops.slope, name).default, (logits, labels, *more))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradient_are_those_of_torch(dtype, device):
    logits, labels, weight = problem(device, dtype)
    logits.requires_grad_()
    losses = token_losses(logits, labels)
    assert losses.dtype == weight.dtype
    theirs = functional.cross_entropy(logits.to(weight.dtype), labels, reduction="none")
    assert torch.allclose(losses, theirs, rtol=1e-6, atol=1e-6)
    (found,), (expected,) = (torch.autograd.grad(loss, logits, weight) for loss in (losses, theirs))
    # Each rounds once, of numbers that are equal up to fp32's rounding.
    assert torch.allclose(found, expected, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_and_beside_are_equal(dtype, device):
    logits, labels, weight = problem(device, dtype)
    normalizer, _ = cross_entropy.label_statistics(logits, labels)
    beside = cross_entropy.logit_gradient(logits, labels, normalizer, weight)
    # Where the rows have gaps in memory, too.
    apart = torch.zeros(TOKENS, VOCABULARY, 2, dtype=dtype, device=device)[..., 0].copy_(logits)
    for subject in (logits, apart):
        cross_entropy.logit_gradient_(subject, labels, normalizer, weight)
        assert torch.equal(subject, beside)


def test_a_label_of_another_rank_is_nowhere(device):
    logits, labels, weight = problem(device, torch.float32)
    normalizer, chosen = cross_entropy.label_statistics(logits, labels - VOCABULARY)
    assert not chosen.any()
    found = cross_entropy.logit_gradient(logits, labels - VOCABULARY, normalizer, weight)
    assert torch.allclose(found, logits.softmax(-1) * weight[:, None], rtol=1e-5)
    beyond = cross_entropy.logit_gradient(logits, labels + VOCABULARY, normalizer, weight)
    assert torch.equal(found, beyond)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_z_loss_joins_the_gradient_alone(dtype, device):
    logits, labels, weight = problem(device, dtype)
    logits.requires_grad_()
    losses = token_losses(logits, labels, 0.1)
    assert torch.equal(losses, token_losses(logits, labels))
    wide = logits.to(weight.dtype)
    theirs = functional.cross_entropy(wide, labels, reduction="none") + 0.1 * wide.logsumexp(-1).square()
    (found,), (expected,) = (torch.autograd.grad(loss, logits, weight) for loss in (losses, theirs))
    assert torch.allclose(found, expected, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6)
    normalizer, _ = cross_entropy.label_statistics(logits.detach(), labels)
    torch.library.opcheck(torch.ops.slope.logit_gradient.default, (logits.detach(), labels, normalizer, weight, 0.1))
    subject = logits.detach().clone()
    cross_entropy.logit_gradient_(subject, labels, normalizer, weight, 0.1)
    assert torch.equal(subject, found)
