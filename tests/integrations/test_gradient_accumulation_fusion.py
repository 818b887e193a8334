"""Megatron's fusion of gradient accumulation serves the dense linears; beside packed ones it changes nothing."""

import types

import pytest

from helpers.megatron_training import Host, train


def train_counted(host: Host):
    """(losses, products that the fused kernel made), apex's kernel being a stand-in of plain torch."""
    from megatron.core.tensor_parallel import layers

    shapes = []

    def accumulate(x_TK, dy_TN, total_NK):
        shapes.append(tuple(total_NK.shape))
        total_NK.add_(dy_TN.t() @ x_TK)

    kernels = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    vars(layers).update(fused_weight_gradient_mlp_cuda=kernels, _grad_accum_fusion_available=True)
    return train(host).losses, shapes


def test_losses_are_those_without(ranks):
    slope = {"backward_mask_interval": 2}
    ((plain, unfused),) = ranks.run(train_counted, Host(slope=slope), world=1)
    fusion = Host(slope=slope, config={"gradient_accumulation_fusion": True})
    ((losses, fused),) = ranks.run(train_counted, fusion, world=1)
    # Of the embedding, which is the output layer too, the sum has another order.
    assert losses == pytest.approx(plain, rel=1e-6) and losses[-1] < losses[0] - 0.5
    # The first QKV and the output layer, which is tied to the embedding, in each micro-batch.
    assert not unfused and sorted(set(fused)) == [(128, 64), (192, 64)]
    assert len(fused) == 2 * 4 * len(losses)
