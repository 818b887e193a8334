"""PrunedLinear: what every linear with a pruned weight shares, packed or masked; Megatron's and torch's own.

N out, K in (this rank's shard), R adapter rank.

    adapter_l       Parameter [R, K]           L^T; adapter_r Parameter [N, R]: R^T (SLoPe, section 3.2)

Operands are derived from weight and patterns and kept (`layers.kept_operands`); see `watches_values` for who says when
they are to follow.
"""

import functools
from collections.abc import Callable

import torch

from slope_megatron.config import SlopeConfig
from slope_megatron.layers.kept_operands import KeptOperands, lent
from slope_megatron.layers.marks import gradient_sum
from slope_megatron.layers.random_streams import RowStreams
from slope_megatron.layers.zero_gradients import with_zero_gradients
from slope_megatron.linear import Communication, slope_linear
from slope_megatron.ops.backend import Following, MvueRng, Products
from slope_megatron.ops.operands.bias import bias_gradient
from slope_megatron.sparsity.tokens import sample_by_sample


class PrunedLinear(torch.nn.Module):
    """A subclass names its patterns, builds operands and may prune the gradient."""

    weight: torch.nn.Parameter
    slope: SlopeConfig
    # Names of the buffers that say which weights count.
    PATTERNS: tuple[str, ...] = ()
    # Gate and up of a gated MLP lie above each other in each shard: checkpoints and initialization see them apart.
    gated = False
    # True: any optimizer may change the weight unseen, so operands are refreshed (about 2 % of a product) in every
    # training forward; in evaluating ones as long as an optimizer may have a gradient to use (Megatron's DDP always has
    # one), and once after; and always once a CUDA graph was captured with this layer. A write through `.data` between
    # other evaluating forwards goes unnoticed. False: whoever trains calls `refresh` or `drop_operands` after every
    # change, as our engine does, and a forward refreshes only after a write that autograd has counted.
    watches_values = True
    # Whether adapters that take no part yet get gradients of zeros: Megatron's reductions wait for a gradient of every
    # parameter where they overlap with backward.
    idle_adapters_get_zeros = False
    # For good: a replayed graph may change values, and runs no Python that could note it.
    _captured = False
    _kept: KeptOperands | None = None
    _present: frozenset[str] = frozenset()

    def init_adapters(self, slope: SlopeConfig, columns: int) -> None:
        """Adapters and what goes with them; called once, at the end of the constructor.

        Args:
            columns: K.
        """
        self.slope = slope
        rows = self.weight.shape[0]
        if slope.rank:
            self.adapter_l = torch.nn.Parameter(self.weight.new_zeros(slope.rank, columns))
            self.adapter_r = torch.nn.Parameter(self.weight.new_zeros(rows, slope.rank))
        self.adapters_active = False
        self.row_streams: RowStreams | None = None

    def current_rng(self) -> MvueRng | None:
        """The generator of dY's unbiased estimate in this micro-batch; None where no gradient is asked for."""
        if not torch.is_grad_enabled():
            return None
        if self.row_streams is None:
            raise RuntimeError(
                f"{type(self).__name__} has no random streams for its unbiased gradient pruning: call "
                "slope_megatron.models.random_streams.attach_random_streams on the built model"
            )
        return self.row_streams.rng(*self.slope.gradient_nm, self.weight.device)

    # -- what is there ------------------------------------------------------------------------------------------------

    def mark_present(self, *names: str) -> None:
        """Weight or patterns have been written; on the `meta` device there is nothing to write."""
        self._present |= {name for name in names if not getattr(self, name).is_meta}

    @property
    def absent(self) -> list[str]:
        """Those of weight and patterns that nobody has initialized or loaded yet."""
        return [name for name in ("weight", *self.PATTERNS) if name not in self._present]

    def check_initialized(self) -> None:
        """
        Raises:
            RuntimeError: memory as it was found would be multiplied.
        """
        if self.absent:
            raise RuntimeError(
                f"{type(self).__name__} has no {', '.join(self.absent)} yet: initialize the built model with "
                "slope_megatron.models.init_weights.init_weights, or load a checkpoint that has all of "
                f"{', '.join(('weight', *self.PATTERNS))}"
            )

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if len(errors) == before:
            self.mark_present(*(name for name in ("weight", *self.PATTERNS) if prefix + name in state_dict))
        self.drop_operands()

    def _apply(self, *arguments, **keywords):
        self.drop_operands()
        result = super()._apply(*arguments, **keywords)
        # On the way to `meta` they are lost.
        self._present = frozenset(name for name in self._present if not getattr(self, name).is_meta)
        return result

    def __getstate__(self):
        # Copies build operands of their own.
        return {**self.__dict__, "_kept": None}

    # -- operands -----------------------------------------------------------------------------------------------------

    def build_operands(self, weight: torch.Tensor) -> Following:
        """Operands of the present values of `weight`, for all products."""
        raise NotImplementedError

    def pattern_buffers(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in self.PATTERNS)

    def present_operands(self, weight: torch.Tensor) -> KeptOperands:
        """The kept operands, of the present values of `weight`: the parameter, or what was given instead of it."""
        kept, patterns = self._kept, self.pattern_buffers()
        training = self.training or (torch.is_grad_enabled() and weight.requires_grad)
        # An optimizer may come before the next product.
        waits = gradient_waits(weight)
        self._captured = self._captured or is_being_captured(weight)
        if kept is not None and not kept.fits(weight):
            kept = None
        if kept is None:
            same_values = same_patterns = False
        elif not self.watches_values:
            same_values, same_patterns = kept.unwritten(weight, patterns)
        else:
            # A capture has to record the refresh, also where nothing has changed yet.
            unchanged = not (training or kept.may_be_stale or waits or self._captured)
            same_values, same_patterns = unchanged and kept.weight.is_same(weight), kept.is_same(patterns)
        if kept is None or not same_patterns:
            # Others may still be wanted by a backward pass: new ones, not these ones changed.
            kept = self._kept = KeptOperands(self.build_operands(weight), weight, patterns)
        elif not same_values:
            kept.refresh(weight)
        else:
            kept.rebind(weight)
        kept.may_be_stale = self.watches_values and (training or waits)
        return kept

    def operands(self) -> Following:
        """The operands of the present values: built on first use, brought up to date where need be."""
        return self.present_operands(self.weight).operands

    def refresh(self) -> None:
        """Bring operands, if there are any, up to the present values: after a change that nobody counts."""
        if self.can_follow:
            assert self._kept is not None
            self._kept.refresh(self.weight)
        else:
            self.drop_operands()

    @property
    def can_follow(self) -> bool:
        """Whether there are operands that take the present values as they are."""
        return self._kept is not None and self._kept.fits(self.weight)

    def follow_values(self) -> None:
        """The device's part of `refresh`, where operands can follow; then `mark_followed` is the host's."""
        assert self._kept is not None
        self._kept.operands.refresh(lent(self.weight))

    def mark_followed(self) -> None:
        assert self._kept is not None
        self._kept.mark_fresh(self.weight)

    @property
    def has_operands(self) -> bool:
        """Whether operands are there now."""
        return self._kept is not None

    def drop_operands(self) -> None:
        """Forget the operands: what they were made of is another."""
        self._kept = None

    def product_operands(self, weight: torch.Tensor) -> tuple[Products, Callable[[torch.Tensor], None] | None]:
        """The operands that the next product with `weight` reads, and what `slope_linear` calls before backward."""
        kept = self.present_operands(weight)
        restore = functools.partial(kept.restore_for_backward, kept.generation) if self.watches_values else None
        return kept.operands, restore

    def gradient_pruning(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What dgrad and wgrad read instead of dY; None: dY itself."""
        return None

    def gradient_rng(self) -> MvueRng | None:
        """Of the unbiased estimate that wgrad reads instead of dY; None: no estimate."""
        return None

    def multiply(self, input, weight, bias, communication: Communication | None = None) -> torch.Tensor:
        """Y for `input` `[..., K]`: the product with `weight`, adapters that have joined and a bias, if there is one.

        Args:
            weight: the parameter, or what was given instead of it.
            communication: of a parallel layer; None on one rank.
        """
        multiply = self._multiply
        if self.watches_values and torch.compiler.is_compiling():
            # Whether values have changed is not for torch.compile to trace.
            multiply = torch.compiler.disable(multiply)
        if not torch.is_inference_mode_enabled():
            return multiply(input, weight, bias, communication)
        # Operands that are made here stay: made of inference tensors, they could never be refreshed in training.
        with torch.inference_mode(False), torch.no_grad():
            return multiply(input, weight, bias, communication)

    def _multiply(self, input, weight, bias, communication: Communication | None) -> torch.Tensor:
        adapters = (self.adapter_l, self.adapter_r) if self.adapters_active else None
        operands, before_backward = self.product_operands(weight)
        rng = self.gradient_rng()
        in_product = False
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
            rng=rng,
            group_tokens=sample_by_sample if rng and self.slope.token_groups == "sequence" else None,
            patterns=self.pattern_buffers(),
            before_backward=before_backward,
            gradient_sum=gradient_sum(weight),
        )
        if self.idle_adapters_get_zeros and self.slope.rank and not self.adapters_active:
            output = with_zero_gradients(output, self.adapter_l, self.adapter_r)
        if in_product:
            return bias_gradient(output, bias)
        return output if bias is None else output + bias


def gradient_waits(weight: torch.Tensor) -> bool:
    """Whether a gradient of this parameter is there for an optimizer, autograd's or the one Megatron's DDP keeps."""
    return weight.is_leaf and (weight.grad is not None or getattr(weight, "main_grad", None) is not None)


def is_being_captured(weight: torch.Tensor) -> bool:
    """Whether what is done with this weight now goes into a CUDA graph."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def check_shard(rows: int, columns: int, slope: SlopeConfig, unit: int, weight: str) -> None:
    """Refuse a shard that cuts a group of n:m, along the inputs or the outputs, or a byte of a bitmask.

    Args:
        unit: what the inputs must be a multiple of.
        weight: "packed" or "masked".
    """
    if rows % slope.m or columns % unit:
        raise ValueError(
            f"a {weight} {slope.nm} shard of {rows} x {columns} (out x in on this rank) cannot be cut: out must be a "
            f"multiple of {slope.m} and in one of {unit}; choose other widths or a smaller tensor-parallel size"
        )
