"""The loss in chunks of tokens against the same mathematics in plain torch over whole logits: losses, all gradients."""

import pytest
import torch

from slope_megatron.layers.linear_cross_entropy import LinearCrossEntropy
from slope_megatron.layers.token_losses import token_losses

TOKENS, HIDDEN, VOCABULARY = 37, 24, 48
FACTOR = 0.3  # no power of two: the scale rounds
CHUNKS = [5, 12, 36, TOKENS, 100]


class Alone:
    """A process group of one."""

    @staticmethod
    def size():
        return 1

    @staticmethod
    def rank():
        return 0


def inputs(dtype, bias, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    shapes = [(TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    mask = (torch.rand(TOKENS, generator=generator) < 0.7).float()
    return tensors[0], tensors[1], tensors[2] if bias else None, labels.to(device), mask.to(device)


def with_gradients(losses, mask, *tensors):
    """Losses and gradients of their masked sum times FACTOR."""
    wanted = [tensor for tensor in tensors if tensor is not None]
    return [losses.detach(), *torch.autograd.grad((losses * mask).sum() * FACTOR, wanted)]


def plain(dtype, bias, exact=False):
    x, w, b, labels, mask = inputs(dtype, bias)
    if exact:
        x, w, b = (None if tensor is None else tensor.double() for tensor in (x, w, b))
    logits = torch.nn.functional.linear(x, w, b)
    upcast = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(upcast, labels, reduction="none")
    return with_gradients(losses, mask, x, w, b)


def of_a_share(z_loss):
    """Of this rank's part of the vocabulary: chunks of tokens, and whole logits."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    x, w, _, labels, mask = inputs(torch.float64, bias=False)
    rows = VOCABULARY // group.size()
    w = w.detach()[group.rank() * rows : (group.rank() + 1) * rows].clone().requires_grad_()
    chunks = LinearCrossEntropy.apply(x, w, None, labels, mask, 5, group, z_loss)
    return [with_gradients(losses, mask, x, w) for losses in (chunks, token_losses(x @ w.t(), labels, z_loss, group))]


@pytest.mark.parametrize("world", [1, 2])
def test_a_z_loss_is_that_of_the_whole_vocabulary(ranks, world):
    """In its gradients; the losses stay without it."""
    x, w, _, labels, mask = inputs(torch.float64, bias=False)
    logits = x @ w.t()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    _, dx, dw = with_gradients(losses + 0.1 * logits.logsumexp(-1).square(), mask, x, w)
    for found in zip(*ranks.run(of_a_share, 0.1, world=world, tensor_parallel=world), strict=True):
        parts = list(zip(*found, strict=True))
        together = (parts[0][0], sum(parts[1]), torch.cat(parts[2]))
        # The common factor of chunks is a quotient of fp32 numbers.
        for ours, theirs in zip(together, (losses, dx, dw), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def in_chunks(dtype, bias, chunk, group, part=slice(None), device="cpu"):
    x, w, b, labels, mask = inputs(dtype, bias, device)
    w = w.detach()[part].clone().requires_grad_()
    b = None if b is None else b.detach()[part].clone().requires_grad_()
    return with_gradients(LinearCrossEntropy.apply(x, w, b, labels, mask, chunk, group), mask, x, w, b)


def check(found, dtype, bias, parts_of_dx=()):
    """No farther from fp64 than three times torch's own way in that type; dw rounds once more for each chunk.

    The sum of few rounded terms may come out exact by chance, so an error of one unit in the last place is free; and
    one of each rank's part of dx, which is rounded before the parts are added, in the whole layer as well.
    """
    for index, (ours, torchs, exact) in enumerate(
        zip(found, plain(dtype, bias), plain(dtype, bias, exact=True), strict=True)
    ):
        # In fp64 there is nothing more exact to compare with: sums of dozens of terms, in another order.
        units = 16 if dtype == torch.float64 else 1
        largest = exact.abs().max() + sum(part.abs().max() for part in parts_of_dx if index == 1)
        error = (ours - exact).abs().max()
        allowed = 3 * (torchs - exact).abs().max() + units * torch.finfo(ours.dtype).eps * largest
        assert error <= allowed, (error, allowed)
        assert ours.dtype == torchs.dtype


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_losses_and_gradients_are_those_of_whole_logits(dtype, bias, chunk):
    check(in_chunks(dtype, bias, chunk, Alone()), dtype, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_they_are_too(dtype, bias, chunk):
    found = in_chunks(dtype, bias, chunk, Alone(), device="cuda")
    check([tensor.cpu() for tensor in found], dtype, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_chunk_has_the_losses_of_whole_logits_to_the_bit(dtype):
    x, w, _, labels, mask = inputs(dtype, bias=False)
    assert torch.equal(
        LinearCrossEntropy.apply(x, w, None, labels, mask, TOKENS, Alone()), token_losses(x @ w.t(), labels)
    )


def shard(dtype, bias, chunk):
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    rows = VOCABULARY // group.size()
    return in_chunks(dtype, bias, chunk, group, slice(group.rank() * rows, (group.rank() + 1) * rows))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_vocabulary(ranks, world, dtype):
    """dx is each rank's part of a sum; dw and db are each rank's rows."""
    found = ranks.run(shard, dtype, True, 16, world=world, tensor_parallel=world)
    losses, dx, dw, db = zip(*found, strict=True)
    assert all(torch.equal(losses[0], other) for other in losses)
    summed = torch.stack(dx).to(torch.promote_types(dtype, torch.float32)).sum(0).to(dtype)
    check([losses[0], summed, torch.cat(dw), torch.cat(db)], dtype, True, dx)


def test_without_gradients_none_are_made():
    x, w, _, labels, _ = inputs(torch.float32, bias=False)
    with torch.no_grad():
        losses = LinearCrossEntropy.apply(x, w, None, labels, None, 5, Alone())
    assert torch.allclose(losses, plain(torch.float32, False)[0], rtol=1e-6)


def test_a_mask_of_nothing_has_no_gradients():
    x, w, _, labels, mask = inputs(torch.float32, bias=False)
    nothing = torch.zeros_like(mask)
    found = with_gradients(LinearCrossEntropy.apply(x, w, None, labels, nothing, 5, Alone()), nothing, x, w)
    assert not any(gradient.any() for gradient in found[1:])


def test_weighted_tokens_count_as_they_are_weighted():
    x, w, _, labels, mask = inputs(torch.float64, bias=False)
    weights = mask * torch.linspace(0.5, 2.5, TOKENS)
    whole = torch.nn.functional.cross_entropy(x @ w.t(), labels, reduction="none")
    expected = with_gradients(whole, weights, x, w)
    found = with_gradients(LinearCrossEntropy.apply(x, w, None, labels, weights, 5, Alone()), weights, x, w)
    # The factor is one fp32 quotient of gradient and mask, whose sum is in fp64.
    assert all(torch.allclose(ours, theirs, rtol=1e-6) for ours, theirs in zip(found, expected, strict=True))


def test_a_gradient_that_is_no_multiple_of_the_mask_is_not_a_number():
    x, w, _, labels, mask = inputs(torch.float32, bias=False)
    losses = LinearCrossEntropy.apply(x, w, None, labels, mask, 5, Alone())
    assert all(gradient.isnan().all() for gradient in torch.autograd.grad(losses.sum(), [x, w]))


def test_a_second_backward_is_refused():
    x, w, _, labels, mask = inputs(torch.float32, bias=False)
    total = (LinearCrossEntropy.apply(x, w, None, labels, mask, 5, Alone()) * mask).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="are used up by its first backward"):
        total.backward()
