"""LayerNorm and RMSNorm as Megatron builds them, with the extra state that Transformer Engine's have."""

import torch


class Norm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape=None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device=None,
    ):
        super().__init__()
        assert (normalized_shape is None) != (hidden_size is None)
        self.size, self.eps = normalized_shape or hidden_size, eps
        self.zero_centered_gamma = zero_centered_gamma
        for name in self.PARAMETERS:
            start = torch.ones if name == "weight" else torch.zeros
            parameter = torch.nn.Parameter(start(self.size, dtype=params_dtype, device=device))
            if sequence_parallel is not None:
                parameter.sequence_parallel = sequence_parallel
            self.register_parameter(name, parameter)

    def scale(self) -> torch.Tensor:
        return 1 + self.weight if self.zero_centered_gamma else self.weight

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        assert state is None or not state.numel()


class LayerNorm(Norm):
    PARAMETERS = ("weight", "bias")

    def forward(self, x):
        return torch.nn.functional.layer_norm(x, (self.size,), self.scale(), self.bias, self.eps)


class RMSNorm(Norm):
    PARAMETERS = ("weight",)

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, (self.size,), self.scale(), self.eps)
