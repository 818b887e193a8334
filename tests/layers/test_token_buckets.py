"""Token counts of experts, rounded up."""

import torch

from slope_megatron.layers.token_buckets import SMALLEST, bucket, in_buckets


def test_few_sizes_each_little_larger_than_what_was_asked_for():
    counts = range(0, 70_000)
    sizes = [bucket(count) for count in counts]
    assert all(size >= count and size % SMALLEST == 0 for size, count in zip(sizes, counts, strict=True))
    assert all(size <= max(count * 9 / 8, count + SMALLEST) for size, count in zip(sizes, counts, strict=True))
    assert bucket(0) == SMALLEST, "no kernel has a product without rows"
    assert len(set(sizes)) < 90 and sizes == sorted(sizes)
    assert all(bucket(size) == size for size in set(sizes))


def test_the_product_sees_zeros_behind_x_and_nobody_else_does():
    rows = []

    def multiply(x_TK, factor):
        rows.append(x_TK.shape[0])
        assert not x_TK[5:].any()
        return x_TK * factor

    x_TK = torch.randn(5, 3, requires_grad=True)
    y_TN = in_buckets(multiply)(x_TK, 2.0)
    y_TN.sum().backward()
    assert rows == [SMALLEST] and torch.equal(y_TN, 2 * x_TK) and torch.equal(x_TK.grad, torch.full((5, 3), 2.0))
