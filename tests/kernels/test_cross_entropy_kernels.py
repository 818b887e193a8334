"""Statistics and gradient of logits against fp64, and where they are not finite against the plain form's kind."""

import pytest
import torch

from slope_megatron.ops.custom_ops import cross_entropy as ops

# Triton's interpreter cuts bf16 off where GPUs round it.
UNITS = {torch.float32: 8, torch.float16: 0.51, torch.bfloat16: 0.51 if torch.cuda.is_available() else 1.01}
# One vector, one turn of a row's program and a bit, several with an odd end, a multiple of a turn.
SHAPES = [(3, 1), (5, 96), (2, 4099), (3, 9001), (2, 8192)]


def problem(tokens, width, dtype, device, scale=3.0):
    """Logits, labels (in range, one below, one beyond), and weights of which one is 0."""
    logits = torch.randn(tokens, width).mul(scale).to(dtype).to(device)
    labels = torch.randint(0, width, (tokens,), device=device)
    labels[0], labels[1] = -width, width
    weight = torch.rand(tokens, device=device)
    weight[-1] = 0
    return logits, labels, weight


def statistics(logits, labels):
    from slope_kernels.triton import cross_entropy

    found = torch.full((2, len(labels)), 777.0, device=logits.device)
    cross_entropy.statistics(logits, labels, found[0], found[1])
    return found


def written(logits, labels, normalizer, weight, in_place, z_loss=0.0):
    from slope_kernels.triton import cross_entropy

    logits = logits.clone()
    found = logits if in_place else torch.full_like(logits, 777.0)
    cross_entropy.gradient(logits, labels, normalizer, weight, found, z_loss)
    return found


def check_gradient(found, logits, labels, normalizer, weight, z_loss=0.0):
    wide = [tensor.double() for tensor in (normalizer, weight)]
    truth = ops.logit_gradient(logits.double().cpu(), labels.cpu(), *(tensor.cpu() for tensor in wide), z_loss)
    found = found.cpu()
    # fp32 inside: softmax may be near 1, which is then subtracted.
    inside = 2e-6 * weight.cpu()[:, None] + torch.finfo(found.dtype).smallest_normal
    rounding = torch.finfo(found.dtype).eps * UNITS[found.dtype] * truth.abs()
    assert ((found.double() - truth).abs() <= rounding + inside).all()


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_statistics(tokens, width, dtype, scale, device):
    logits, labels, _ = problem(tokens, width, dtype, device, scale)
    normalizer, chosen = statistics(logits, labels)
    exact, exact_chosen = ops.label_statistics(logits.double().cpu(), labels.cpu())
    assert torch.equal(chosen.cpu().double(), exact_chosen)
    assert torch.allclose(normalizer.cpu().double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
@pytest.mark.parametrize(("in_place", "z_loss"), [(False, 0.0), (True, 0.0), (False, 0.01)])
def test_gradient(tokens, width, dtype, in_place, z_loss, device):
    logits, labels, weight = problem(tokens, width, dtype, device)
    # Over all ranks' logits: larger than these alone would have it.
    normalizer = statistics(logits, labels)[0] + torch.rand(tokens, device=device)
    found = written(logits, labels, normalizer, weight, in_place, z_loss)
    check_gradient(found, logits, labels, normalizer, weight, z_loss)


INF, NAN = float("inf"), float("nan")
# What a row has where, and whether everywhere else is -inf.
SPOILT = [
    ({0: INF}, False),
    ({5000: INF, 8999: INF}, False),
    ({7: -INF, 8: -INF}, False),
    ({}, True),
    ({4100: 2.5}, True),
    ({8000: INF}, True),
    ({3: NAN}, False),
    ({3: NAN}, True),
    ({5000: NAN, 1: INF}, False),
]


@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_what_is_not_finite_comes_out_as_in_torch(dtype, device):
    logits, labels, weight = problem(len(SPOILT), 9001, dtype, device)
    for row, (places, alone) in enumerate(SPOILT):
        if alone:
            logits[row] = -INF
        for place, value in places.items():
            logits[row, place] = value
    labels[2:5] = torch.tensor([7, 6, 4100])
    plain = ops.label_statistics(logits.cpu(), labels.cpu())
    found = statistics(logits, labels)
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.allclose(ours.cpu(), theirs, rtol=1e-6, equal_nan=True)
    expected = ops.logit_gradient(logits.cpu(), labels.cpu(), plain[0], weight.cpu())
    ours = written(logits, labels, found[0], weight, True).cpu()
    assert torch.equal(ours.isnan(), expected.isnan())
    finite = ~expected.isnan()
    units = 8 if dtype == torch.float32 else 1.01
    assert torch.allclose(
        ours[finite].float(), expected[finite].float(), rtol=units * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128_256, 16_032, 50_257])
def test_a_vocabulary_s_size(width, device):
    """The ops themselves, on whole and shared vocabularies, and on one whose rows start at odd addresses."""
    logits, labels, weight = problem(64, width, torch.bfloat16, device)
    normalizer, chosen = ops.label_statistics(logits, labels)
    exact, exact_chosen = ops.label_statistics(logits.double().cpu(), labels.cpu())
    assert torch.equal(chosen.cpu().double(), exact_chosen)
    assert torch.allclose(normalizer.cpu().double(), exact, rtol=1e-6, atol=1e-6)
    found = ops.logit_gradient(logits, labels, normalizer, weight)
    check_gradient(found, logits, labels, normalizer, weight)
    ops.logit_gradient_(logits, labels, normalizer, weight)
    assert torch.equal(logits, found)


@pytest.mark.gpu
def test_large_offsets(device):
    """More than 2^31 logits: offsets are 64-bit."""
    tokens, width = 17_000, 128_256
    logits = torch.zeros(tokens, width, dtype=torch.bfloat16, device=device)
    logits[-1] = torch.randn(width, device=device)
    labels, weight = torch.full((tokens,), width - 1, device=device), torch.ones(tokens, device=device)
    last = logits[-1:].clone()
    normalizer, chosen = statistics(logits, labels)
    assert chosen[-1] == last[0, -1]
    assert torch.allclose(normalizer[-1].double(), last[0].double().logsumexp(0), rtol=1e-6)
    ops.logit_gradient_(logits, labels, normalizer, weight)
    check_gradient(logits[-1:], last, labels[-1:], normalizer[-1:], weight[-1:])
