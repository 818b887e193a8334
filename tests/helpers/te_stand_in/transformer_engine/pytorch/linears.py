"""Linears of a dense model on one tensor-parallel rank; the norm inside, where the name says so."""

import torch


class Linear(torch.nn.Module):
    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, tp_size: int = 1, params_dtype=None, **kind
    ):
        super().__init__()
        assert tp_size == 1, "the stand-in's linears are not cut"
        self.use_bias, self.skips_bias = bias, kind.get("return_bias", False)
        self.weight = torch.nn.Parameter(torch.zeros(out_features, in_features, dtype=params_dtype))
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype))

    def multiply(self, x):
        bias = self.bias if self.use_bias else None
        if self.skips_bias:
            return torch.nn.functional.linear(x, self.weight), bias
        return torch.nn.functional.linear(x, self.weight, bias)

    def forward(self, x, is_first_microbatch=None):
        return self.multiply(x)

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        assert state is None or not state.numel()


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, eps=1e-5, normalization="LayerNorm", params_dtype=None, **rest):
        super().__init__(in_features, out_features, params_dtype=params_dtype, **rest)
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, dtype=params_dtype))

    def forward(self, x, is_first_microbatch=None):
        shape = (x.shape[-1],)
        if self.layer_norm_bias is None:
            return self.multiply(torch.nn.functional.rms_norm(x, shape, self.layer_norm_weight, self.eps))
        normed = torch.nn.functional.layer_norm(x, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return self.multiply(normed)
