"""PrunedLinear: what every linear with a pruned weight shares, packed or masked, column- or row-parallel.

N out, K in (this rank's shard), R adapter rank.

    adapter_l       Parameter [R, K]           L^T; adapter_r Parameter [N, R]: R^T (SLoPe, section 3.2)
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.communication import TensorParallelCommunication
from slope_megatron.layers.draws import RowDraws
from slope_megatron.linear import slope_linear
from slope_megatron.ops.backend import Products, TokenDraws
from slope_megatron.ops.operands.bias import bias_gradient


class PrunedLinear(torch.nn.Module):
    """Mixed into Megatron's linears. A subclass gives `operands()`, and what it prunes of the gradient."""

    weight: torch.nn.Parameter
    slope: SlopeConfig
    tp_group: dist.ProcessGroup

    @classmethod
    def configured(cls, slope: SlopeConfig) -> type:
        """This class with `slope` bound: what Megatron's layer specs take, some of which only call a class."""
        return type(cls.__name__, (cls,), {"__init__": functools.partialmethod(cls.__init__, slope=slope)})

    def init_adapters(self, slope: SlopeConfig, columns: int, partition_dim: int, stride: int) -> None:
        """Adapters and what goes with them; called once, at the end of the constructor.

        Args:
            columns: K.
            partition_dim: axis of the weight that tensor parallelism cuts: 0 (column) or 1 (row).
        """
        self.slope = slope
        self.replicated_adapter = "l" if partition_dim == 0 else "r"
        rows = self.weight.shape[0]
        if slope.rank:
            self.adapter_l = torch.nn.Parameter(self.weight.new_zeros(slope.rank, columns))
            self.adapter_r = torch.nn.Parameter(self.weight.new_zeros(rows, slope.rank))
            cut = self.adapter_r if partition_dim == 0 else self.adapter_l
            set_tensor_model_parallel_attributes(cut, True, partition_dim, stride)
        self.adapters_active = False
        self.row_draws: RowDraws | None = None

    def present_draws(self) -> TokenDraws | None:
        """Of the unbiased estimate of dY at this place in the run; None where no gradient is asked for."""
        if not torch.is_grad_enabled():
            return None
        if self.row_draws is None:
            raise RuntimeError(
                f"{type(self).__name__} has no draws for its unbiased gradient pruning: call "
                "slope_megatron.models.draws.attach_draws on the built model"
            )
        return self.row_draws.present(*self.slope.gradient_nm, self.weight.device)

    def operands(self) -> Products:
        """The operands of the present values."""
        raise NotImplementedError

    def drop_operands(self) -> None:
        """Forget them: what they were made of is another."""
        raise NotImplementedError

    def product_operands(self) -> Products:
        """The operands that the next product reads."""
        return self.operands()

    def gradient_pruning(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What dgrad and wgrad read instead of dY; None: dY itself."""
        return None

    def gradient_draws(self) -> TokenDraws | None:
        """Of the unbiased estimate that wgrad reads instead of dY; None: no estimate."""
        return None

    def _forward_impl(self, input, weight, *, bias, allreduce_dgrad, sequence_parallel, tp_group=None, **_):
        """Megatron's hook for the product itself; gathers and reductions around it are Megatron's own."""
        if torch.is_inference_mode_enabled():
            # Operands that are made here stay: made of inference tensors, they could never be refreshed in training.
            keywords = {"bias": bias, "allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel}
            with torch.inference_mode(False), torch.no_grad():
                return self._forward_impl(input, weight, **keywords)
        communication = TensorParallelCommunication(
            group=self.tp_group,
            sequence_parallel=sequence_parallel,
            allreduce_dgrad=allreduce_dgrad,
            replicated_adapter=self.replicated_adapter,
        )
        adapters = (self.adapter_l, self.adapter_r) if self.adapters_active else None
        operands, in_product = self.product_operands(), False
        if bias is not None and hasattr(operands, "with_bias"):
            # Where the product can add the bias on its way out, nothing reads the output once more.
            operands, in_product = operands.with_bias(bias), True
        output = slope_linear(
            input,
            weight,
            operands,
            adapters=adapters,
            communication=communication,
            prune=self.gradient_pruning(),
            draws=self.gradient_draws(),
        )
        if in_product:
            return bias_gradient(output, bias)
        return output if bias is None else output + bias


def refuse_unsupported(config, **asked) -> None:
    """Options of Megatron's linears that a pruned weight cannot serve yet: refused with the reason, never ignored."""
    if config.gradient_accumulation_fusion:
        raise ValueError(
            "gradient_accumulation_fusion is on: packed gradients go through autograd; set "
            "gradient_accumulation_fusion=False"
        )
    for name, value in asked.items():
        if value:
            raise ValueError(f"{name} is {value!r}: a packed 2:4 linear does not support it; keep this linear dense")
