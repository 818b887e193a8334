"""Norms in Megatron's constructor dialect: torch's own, marked where they see a part of the sequence."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from slope_megatron.layers.norm import Norm, own_norm


def config(**more):
    return SimpleNamespace(
        **{"normalization": "LayerNorm", "params_dtype": torch.float32, "sequence_parallel": True, **more}
    )


@pytest.mark.parametrize(("kind", "torchs"), [("LayerNorm", torch.nn.LayerNorm), ("RMSNorm", torch.nn.RMSNorm)])
@pytest.mark.parametrize("cut", [True, False])
def test_a_part_of_the_sequence_is_as_good_as_all_of_it(kind, torchs, cut):
    norm = Norm(config=config(normalization=kind, sequence_parallel=cut), hidden_size=16, eps=1e-3)
    assert isinstance(norm, torchs)
    x = torch.randn(8, 2, 16)
    expected = torchs(16, eps=1e-3)(x)
    assert torch.equal(torch.cat([norm(part) for part in x.split(4)]), expected)
    # Whoever sums gradients over the tensor-parallel ranks looks for this mark.
    assert all(parameter.sequence_parallel == cut for parameter in norm.parameters())


def test_what_torchs_norms_do_not_have_is_refused():
    with pytest.raises(ValueError, match="layernorm_zero_centered_gamma is on and torch's norms do not have it"):
        Norm(config=config(layernorm_zero_centered_gamma=True), hidden_size=16)


def test_only_megatrons_wrapper_is_replaced():
    assert own_norm(WrappedTorchNorm) is Norm
    assert own_norm(torch.nn.LayerNorm) is torch.nn.LayerNorm, "apex's, say"
