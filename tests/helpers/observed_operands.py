"""What the packed operands of an upstream script's model hold, before and after each refresh: one line a step.

    operands: step 3, 15 linears of CusparseltOperands, forward 9213 -> 0, dgrad 7011 -> 0, new patterns 0, adapters off

The numbers count places in which an operand differs from the present values: many before the refresh, none after it. An
operand is read through its own product, with the identity.
"""

import torch


def observe(plugin, tokens: int) -> None:
    """Wrap the plugin's refresh.

    Args:
        tokens: of a micro-batch: for another number, kernels are chosen anew.
    """
    refresh = plugin.refresh_operands

    def observed(chunks, slope, step, *, whole=True):
        if not whole:
            # Values that are still to be gathered are not looked at.
            return refresh(chunks, slope, step, whole=False)
        # Of Megatron-DeepSpeed's megatron.core no more than the layers need is there.
        from slope_megatron.layers.packed_weight import PackedWeight

        every = [module for chunk in chunks for module in chunk.modules()]
        modules = [module for module in every if isinstance(module, PackedWeight)]
        columns = [module.weight_column.clone() for module in modules]
        before = wrong_places(modules, tokens)
        refresh(chunks, slope, step)
        after = wrong_places(modules, tokens)
        kinds = " and ".join(sorted({type(module.operands()).__name__ for module in modules}))
        changes = zip(modules, columns, strict=True)
        new = sum(not torch.equal(module.weight_column, column) for module, column in changes)
        on = "on" if all(module.adapters_active for module in modules) else "off"
        counts = ", ".join(f"{product} {before[product]} -> {after[product]}" for product in before)
        print(f"operands: step {step}, {len(modules)} linears of {kinds}, {counts}, new patterns {new}, adapters {on}")

    plugin.refresh_operands = observed


@torch.no_grad()
def wrong_places(modules, tokens: int) -> dict[str, int]:
    """Places of all operands, as they are now, that differ from the values and patterns as they are now."""
    from slope_megatron.sparsity.packing import unpack

    found = {"forward": 0, "dgrad": 0}
    for module in modules:
        values, row = module.weight.detach(), module.row_pattern()
        wanted = {"forward": unpack(values, row), "dgrad": unpack(values * module.surviving(), row)}
        for product, matrix_NK in wanted.items():
            held = matrix_of(module._kept.operands, product, matrix_NK, tokens)
            found[product] += int((held != matrix_NK).sum())
    return found


def matrix_of(operands, product: str, like_NK: torch.Tensor, tokens: int) -> torch.Tensor:
    """W^R or W^{R,C} `[N, K]` as the operand has it: the rows of its product with the identity."""
    rows, columns = like_NK.shape
    size = columns if product == "forward" else rows
    identity = torch.zeros(max(tokens, size), size, dtype=like_NK.dtype, device=like_NK.device)
    identity[:size].fill_diagonal_(1.0)
    answer = getattr(operands, product)(identity)[:size]
    return answer.t() if product == "forward" else answer
