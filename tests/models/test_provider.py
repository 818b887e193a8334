"""Megatron's configuration of the blocks, as this machine and the parameter type call for."""

import pytest
import torch

from helpers.models import small_config
from slope_megatron.models.provider import transformer_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_loss_is_fused_only_where_its_bf16_gradient_costs_nothing(monkeypatch, dtype):
    """Megatron's fused cross-entropy rounds the logits' gradient to bf16: an fp32 run would get 8 bits of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert transformer_config(small_config(), dtype).cross_entropy_loss_fusion == (dtype == torch.bfloat16)


def test_nothing_is_fused_on_cpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = transformer_config(small_config(), torch.bfloat16)
    assert not (config.cross_entropy_loss_fusion or config.bias_dropout_fusion)
