"""What a training loop does besides its own: after each optimizer step, one call; with adapters, one before it.

Operands follow the weights by themselves (`PrunedLinear.watches_values`). The second pruning is chosen anew every
`backward_mask_interval` steps, and adapters join for the last `lazy_fraction` of them.
"""

import torch
import torch.distributed as dist

from slope_megatron.layers.random_streams import RngState
from slope_megatron.torch_layers.linear import sparse_linears


def before_step(model: torch.nn.Module) -> None:
    """Call before `optimizer.step()` where several ranks train adapters; under DeepSpeed there is no such moment.

    Adapters that take no part yet have gradients of zeros there (`SlopeLinear.idle_adapters_get_zeros`); without any,
    the optimizer neither decays them nor counts their steps, the same as on one rank.
    """
    for linear in sparse_linears(model).values():
        if linear.slope.rank and not linear.adapters_active:
            linear.adapter_l.grad = linear.adapter_r.grad = None


def after_step(model: torch.nn.Module, steps_done: int, steps: int | None = None) -> None:
    """Call after `optimizer.step()`, on every rank.

    Args:
        steps_done: optimizer steps, with the one just done.
        steps: of the whole run: the adapters join as far from its end as `lazy_fraction` says. None: they do not.
    """
    linears = sparse_linears(model).values()
    for linear in linears:
        interval = linear.slope.backward_mask_interval
        if interval and steps_done % interval == 0:
            linear.update_column_pattern()
        if linear.row_streams:
            linear.row_streams.state.step = steps_done
        start = linear.slope.adapter_start(steps) if steps else None
        if start is not None and steps_done >= start:
            linear.adapters_active = True


def join_adapters(model: torch.nn.Module) -> None:
    """The adapters take part from here on.

    Raises:
        ValueError: there are none.
    """
    linears = sparse_linears(model).values()
    if not any(linear.slope.rank for linear in linears):
        raise ValueError("this model has no adapters: call sparsify with adapter_rank, 16 for instance")
    for linear in linears:
        linear.adapters_active = True


def follow_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int | None = None, done: int = 0):
    """Have `optimizer.step()` make the calls of `before_step` and `after_step`; returns the handles of both hooks.

    Args:
        done: steps that were done before, of a run that goes on.
    """
    count = done

    def after(*_):
        nonlocal count
        count += 1
        after_step(model, count, steps)

    before = optimizer.register_step_pre_hook(lambda *_: before_step(model))
    return before, optimizer.register_step_post_hook(after)


class CountMicroBatches:
    """Before each training forward of the whole model: other random numbers for mode `full`, on every rank its own."""

    def __init__(self, state: RngState):
        self.state, self.count = state, 0

    @torch.compiler.disable
    def __call__(self, model: torch.nn.Module, *_) -> None:
        if not model.training:
            return
        several = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.state.micro_batch = self.count * world + rank
        self.count += 1


def count_micro_batches(model: torch.nn.Module, state: RngState) -> None:
    model.register_forward_pre_hook(CountMicroBatches(state))
