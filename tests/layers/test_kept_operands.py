"""Operands that read a parameter where it lies keep none of its memory: ZeRO-3 gathers it for each use and frees it."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from helpers.packed import packed_weight
from slope_megatron.layers.kept_operands import KeptOperands
from slope_megatron.ops import choices
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.operands.packed import PackedOperands

ROWS, COLUMNS, TOKENS = 64, 128, 32


class Gathered:
    """The values of a parameter, here for the time of a `with` block; afterwards, whether their memory is free."""

    def __init__(self, parameter: torch.nn.Parameter, values: torch.Tensor):
        self.parameter, self.values, self.is_free = parameter, values, False

    def __enter__(self):
        self.parameter.data = self.values.clone()
        self.memory = StorageWeakRef(self.parameter.untyped_storage())
        return self

    def __exit__(self, *_):
        self.parameter.data = self.parameter.new_empty(0)
        self.is_free = self.memory.expired()


def test_memory_of_a_gathered_parameter_is_free_after_its_use():
    weight = packed_weight(ROWS, COLUMNS, torch.bfloat16, "cpu", whole_numbers=True)
    patterns = (weight.row_bits, weight.column_bits)
    parameter = torch.nn.Parameter(weight.values.clone())
    choices.clear()
    # Dgrad wants a dense copy: it is made in backward, of the values that are here then.
    choices.record(Key(Product.DGRAD, COLUMNS, ROWS, TOKENS, torch.bfloat16), Choice(False))
    try:
        with Gathered(parameter, weight.values) as built:
            operands = PackedOperands(parameter, *patterns, library="cutlass")
            kept = KeptOperands(operands, parameter, patterns)
        x_TK, dy_TN = torch.ones(TOKENS, COLUMNS).bfloat16(), torch.ones(TOKENS, ROWS).bfloat16()
        for factor in (-1, 2):
            with Gathered(parameter, factor * weight.values) as updated:
                kept.refresh(parameter)
            with Gathered(parameter, factor * weight.values) as forward:
                kept.rebind(parameter)
                y_TN = operands.forward(x_TK)
            with Gathered(parameter, factor * weight.values) as backward:
                dx_TK = operands.dgrad(dy_TN)
            assert updated.is_free and forward.is_free and backward.is_free
            assert torch.equal(y_TN, x_TK @ (factor * weight.dense()).t())
            assert torch.equal(dx_TK, dy_TN @ (factor * weight.doubly_pruned()))
        assert built.is_free and list(operands.dense) == [Product.DGRAD]
    finally:
        choices.clear()
