"""The SLoPe linear as an autograd function.

T tokens, N out, K in, C = K n/m kept per row, R adapter rank. The adapter factors are stored like `torch.nn.Linear`
weights: `adapter_l` is L^T `[R, K]`, `adapter_r` is R^T `[N, R]`.

    forward   Y  = X (W^R)^T + (1/R) (X L) R
    dgrad     dX = dY W^{R,C} + (1/R) (dY R^T) L^T
    wgrad     dW = dY^T X at the kept positions: packed `[N, C]`, the shape of the parameter
                   (with an rng: P(dY)^T X, P the unbiased N:M estimate along the tokens)
    adapters  dL^T = ((1/R) dY R^T)^T X,   dR^T = (1/R) dY^T (X L)

Surprising: dgrad reads the doubly pruned W^{R,C}, not the W^R of the forward (SLoPe, section 3.1); the packed values
enter as a tensor so that autograd hands them their gradient, and checks that nobody writes them (or the patterns)
between forward and backward; the products read the operands derived from them.
Under tensor parallelism dX is complete only after a reduction; it starts as soon as dX is there, the adapters' share
included, and travels while dW is computed. Under sequence parallelism X, gathered again for dW, travels before, while
dX is computed.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch

from slope_megatron.ops.backend import MvueRng, Product, Products
from slope_megatron.ops.operands import low_rank


class Handle(Protocol):
    """A tensor that may still be on its way."""

    def wait(self) -> torch.Tensor: ...


class Communication(Protocol):
    """What a parallel layer adds around the products."""

    def gather_input(self, x: torch.Tensor) -> Handle:
        """The whole input, from this rank's part of the sequence."""

    def reduce_input_gradient(self, dx: torch.Tensor) -> Handle:
        """This rank's part of the sum of dX over the ranks."""

    def reduce_adapter_gradients(self, dl: torch.Tensor, dr: torch.Tensor) -> tuple[Handle, Handle]:
        """The adapters' gradients, summed over the ranks where a factor is replicated."""


class Ready:
    """A pending tensor that is already here."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


class NoCommunication:
    """One rank holds everything."""

    def gather_input(self, x: torch.Tensor) -> Ready:
        return Ready(x)

    def reduce_input_gradient(self, dx: torch.Tensor) -> Ready:
        return Ready(dx)

    def reduce_adapter_gradients(self, dl: torch.Tensor, dr: torch.Tensor) -> tuple[Ready, Ready]:
        return Ready(dl), Ready(dr)


@dataclasses.dataclass(frozen=True)
class ProductOptions:
    """What a product takes besides tensors; the fields are those arguments of `slope_linear`."""

    communication: Communication
    prune: Callable[[torch.Tensor], torch.Tensor] | None
    rng: MvueRng | None
    group_tokens: Callable[[torch.Tensor], torch.Tensor] | None
    patterns: tuple[torch.Tensor, ...]
    before_backward: Callable[[torch.Tensor], None] | None
    gradient_sum: torch.Tensor | None
    # Whether autograd records: nothing is kept for a backward that does not come.
    recorded: bool


class SlopeLinearFunction(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(ctx, x, values_NC, adapter_l_RK, adapter_r_NR, operands: Products, options: "ProductOptions"):
        communication = options.communication
        full_x = communication.gather_input(x).wait()
        x_TK = full_x.flatten(0, -2)
        hidden_TR = rounded = None
        if adapter_l_RK is None:
            keeps = options.recorded and ctx.needs_input_grad[1] and full_x is x
            if keeps and hasattr(operands, "rounded_input"):
                rounded = operands.rounded_input(x_TK)
            y_TN = operands.forward(x_TK)
        else:
            scale = 1.0 / adapter_l_RK.shape[0]
            y_TN, hidden_TR = low_rank.product(operands, Product.FORWARD, x_TK, adapter_l_RK, adapter_r_NR, scale)
        # The sequence-parallel input is saved as it came, a part, and gathered again in backward.
        kept = rounded or (x, None)
        ctx.save_for_backward(*kept, adapter_l_RK, adapter_r_NR, hidden_TR, values_NC, *options.patterns)
        ctx.operands, ctx.options, ctx.is_rounded = operands, options, rounded is not None
        return y_TN.unflatten(0, full_x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        if torch.is_autocast_enabled(dy.device.type):
            # As in forward; a caller may have left it on.
            with torch.autocast(dy.device.type, enabled=False):
                return SlopeLinearFunction.backward(ctx, dy)
        x, scale_of_x, adapter_l_RK, adapter_r_NR, hidden_TR, values_NC, *_ = ctx.saved_tensors
        operands, communication, prune = ctx.operands, ctx.options.communication, ctx.options.prune
        if ctx.options.before_backward:
            ctx.options.before_backward(values_NC)
        need_dx, need_values = ctx.needs_input_grad[:2]
        # Of two factors one may be frozen: autograd drops a gradient that nobody wants.
        need_adapters = any(ctx.needs_input_grad[2:4])
        to_gather = (need_values or need_adapters) and not ctx.is_rounded
        gathering = communication.gather_input(x) if to_gather else None
        dy_TN = dy.flatten(0, -2)
        dhidden_TR = None
        # The adapters' gradients are exact: they read dY itself.
        pruned_TN = prune(dy).flatten(0, -2) if prune else dy_TN
        reducing = None
        if need_dx:
            if adapter_l_RK is None:
                dx_TK = operands.dgrad(pruned_TN)
            else:
                down, up, scale = adapter_r_NR.t(), adapter_l_RK.t(), 1.0 / adapter_l_RK.shape[0]
                other = pruned_TN if pruned_TN is not dy_TN else None
                dx_TK, dhidden_TR = low_rank.product(operands, Product.DGRAD, dy_TN, down, up, scale, other)
            reducing = communication.reduce_input_gradient(dx_TK.unflatten(0, dy.shape[:-1]))
        adapter_gradients = dvalues_NC = None
        total = ctx.options.gradient_sum
        if ctx.is_rounded and need_values:
            dvalues_NC = operands.wgrad_of_rounded(pruned_TN, x, scale_of_x, total)
        if gathering:
            # The input was travelling while dX was computed.
            full_x = gathering.wait()
            x_TK = full_x.flatten(0, -2)
            if need_adapters:
                if dhidden_TR is None:
                    dhidden_TR = low_rank.hidden(dy_TN, adapter_r_NR.t(), 1.0 / adapter_l_RK.shape[0])
                # Both hiddens have their 1/R already.
                dl_RK, dr_NR = dhidden_TR.t() @ x_TK, dy_TN.t() @ hidden_TR
                adapter_gradients = communication.reduce_adapter_gradients(dl_RK, dr_NR)
            if need_values:
                group = ctx.options.group_tokens
                read = (group(dy), group(full_x)) if group else (pruned_TN, x_TK)
                dvalues_NC = operands.wgrad(*read, ctx.options.rng, total)
        dx = reducing.wait() if reducing else None
        dl_RK, dr_NR = (pending.wait() for pending in adapter_gradients) if adapter_gradients else (None, None)
        return dx, dvalues_NC, dl_RK, dr_NR, None, None


def slope_linear(
    x,
    values_NC,
    operands: Products,
    *,
    adapters=None,
    communication=None,
    prune: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rng: MvueRng | None = None,
    group_tokens: Callable[[torch.Tensor], torch.Tensor] | None = None,
    patterns: tuple[torch.Tensor, ...] = (),
    before_backward: Callable[[torch.Tensor], None] | None = None,
    gradient_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """Y for `x` `[..., K]`; the leading axes are tokens. Under autocast too in the type of the values.

    Args:
        values_NC: the packed Parameter; its gradient comes back packed.
        operands: the backend's operands of the same values.
        adapters: `(adapter_l_RK, adapter_r_NR)` once they have joined, else None.
        communication: of a parallel layer; None on one rank.
        prune: dY `[..., N]` -> what dgrad and wgrad read instead; None: dY itself.
        rng: of the unbiased estimate that wgrad alone reads instead; None: no estimate.
        group_tokens: X or dY `[..., K]` -> `[T, K]` with the tokens in an order in which the estimate's groups are
            neighbours; None: as they lie. Not together with `prune`.
        patterns: what the operands were made of besides the values; checked like them.
        before_backward: called with the values as forward read them, before backward's products: where operands may
            have followed other values since.
        gradient_sum: fp32 of the values' shape: dW is added to it, and autograd gets none for the values.
    Raises:
        RuntimeError: in backward, autograd's own: the values or a pattern were written in place after forward.
    """
    recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    communication = communication or NoCommunication()
    options = ProductOptions(communication, prune, rng, group_tokens, patterns, before_backward, gradient_sum, recorded)
    arguments = (values_NC, *(adapters or (None, None)), operands, options)
    if not torch.is_autocast_enabled(x.device.type):
        return SlopeLinearFunction.apply(x, *arguments)
    # Operands are of one type: what autocast would make of the other factor cannot be multiplied with them.
    with torch.autocast(x.device.type, enabled=False):
        return SlopeLinearFunction.apply(x.to(values_NC.dtype), *arguments)
