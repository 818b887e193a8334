"""What a linear holds in memory, dense or packed 2:4, in training and for inference: allocated and counted.

Everything is built by the functions that training and inference use, and each part is charged with what
`torch.cuda.memory_allocated` says it took; what a backend's operands hold is let go part by part, and charged with what
comes free. Beside it stands the formula. W = N K weights, kept half:

    values            2 W dense, W packed          row pattern       W / 8        column pattern    W / 16
    operands          W values + W / 8 metadata each, forward and backward (inference: forward alone); with adapters in
                      them, as much more as their outer shape says
    gradients         4 W, or 2 W packed           AdamW             12 W, or 6 W packed: fp32 master, two moments
    adapters          18 R (N + K) in training (2 + 4 + 12), 2 R (N + K) for inference
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch

DTYPE = torch.bfloat16


@dataclasses.dataclass
class Ledger:
    """Bytes of each item: (allocated, counted)."""

    items: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def charge(self, item: str, allocated: float, counted: float) -> None:
        before = self.items.get(item, (0.0, 0.0))
        self.items[item] = (before[0] + allocated, before[1] + counted)

    @contextlib.contextmanager
    def allocation(self, item: str, counted: float):
        """Charge what is allocated inside and still there at the end."""
        # A new tensor must not get a larger block that is left over, whose whole size would count as its own.
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        yield
        self.charge(item, torch.cuda.memory_allocated() - before, counted)

    @property
    def total(self) -> float:
        return sum(allocated for allocated, _ in self.items.values())


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def charge_training(ledger: Ledger, parameter: torch.Tensor, prefix: str = "") -> list:
    """The fp32 gradient sum and AdamW's state of one parameter; what is returned keeps them alive."""
    size = parameter.numel()
    with ledger.allocation(f"{prefix}gradients", 4 * size):
        gradient = torch.zeros(parameter.shape, device="cuda")
    with ledger.allocation(f"{prefix}fp32 master", 4 * size):
        master = torch.nn.Parameter(parameter.detach().float())
    optimizer = torch.optim.AdamW([master], lr=1e-4, fused=True)
    master.grad = gradient
    with ledger.allocation(f"{prefix}AdamW moments", 8 * size):
        optimizer.step()
    return [gradient, master, optimizer]


def charge_adapters(ledger: Ledger, rows: int, columns: int, rank: int, train: bool) -> tuple[list, list]:
    """The factors, `[R, K]` and `[N, R]`, and what keeps their state alive."""
    if not rank:
        return [], []
    with ledger.allocation("adapters", 2 * rank * (rows + columns)):
        factors = [randn(rank, columns), randn(rows, rank)]
    state = [charge_training(ledger, factor, "adapters' ") for factor in factors] if train else []
    return factors, state


def charge_operands(ledger: Ledger, operands, weights: int, shared: tuple[torch.Tensor, ...] = ()) -> None:
    """Let an operands object go, part by part. `shared` tensors are charged elsewhere."""
    storages = {tensor.data_ptr() for tensor in shared}
    forms = (("", getattr(operands, "sparse", {})), ("dense ", getattr(operands, "dense", {})))
    for kind, form in forms:
        for product in list(form):
            charge_operand(ledger, f"{kind}{product} operand", form.pop(product), weights, storages)
    # Of other backends, and what the forms have in common.
    for part in (operands, getattr(operands, "patterns", None)):
        charge_tensors(ledger, "", part, storages, {})


def charge_operand(ledger: Ledger, label: str, operand, weights: int, storages: set[int]) -> None:
    """Values and metadata lie in one buffer, or apart; with room for adapters there is that much more of both."""
    outer = weights
    if hasattr(operand, "outer_columns"):
        outer = operand.rows * operand.outer_columns
    counted = {"buffer": outer * 9 / 8, "values_RC": weights, "metadata": weights / 8, "matrix_NK": 2 * weights}
    charge_tensors(ledger, f"{label}: ", operand, storages, counted)


def charge_tensors(ledger: Ledger, prefix: str, owner, storages: set[int], counted: dict[str, float]) -> None:
    """Let the tensors that are attributes of `owner` go, one by one; what is not counted is counted as it is."""
    for name in [name for name, value in vars(owner or object).items() if isinstance(value, torch.Tensor)]:
        tensor = getattr(owner, name)
        if tensor.data_ptr() in storages or not tensor.numel():
            continue
        expected = counted.get(name, float(tensor.nbytes))
        del tensor
        before = torch.cuda.memory_allocated()
        setattr(owner, name, None)
        ledger.charge(f"{prefix}{name}", before - torch.cuda.memory_allocated(), expected)


def run_products(operands, factors: list, rows: int, columns: int, tokens: int, train: bool) -> None:
    """Each product once: a choice may want a dense copy beside an operand, or adapters in it, which is then held."""
    from slope_megatron.ops.choices import Product
    from slope_megatron.ops.operands import low_rank

    x, dy = randn(tokens, columns), randn(tokens, rows)
    if not factors:
        operands.forward(x)
        _ = operands.dgrad(dy) if train else None
    else:
        left, right = factors
        low_rank.product(operands, Product.FORWARD, x, left, right, 1.0)
        _ = low_rank.product(operands, Product.DGRAD, dy, right.t(), left.t(), 1.0) if train else None
    torch.cuda.synchronize()


def dense_linear(ledger: Ledger, rows: int, columns: int, train: bool) -> None:
    with ledger.allocation("values", 2 * rows * columns):
        weight = randn(rows, columns)
    kept = charge_training(ledger, weight) if train else None
    del kept


def sparse_linear(ledger, rows: int, columns: int, rank: int, train: bool, backend: str, tokens: int) -> None:
    """In training what `layers/packed_weight.py` holds; for inference what `inference/linear.py` does."""
    from slope_megatron.inference.linear import SparseLinear
    from slope_megatron.ops.autotune.trials import random_bits
    from slope_megatron.ops.backend import build_operands, choose_column_bits

    weights = rows * columns
    if not train:
        factors, _ = charge_adapters(ledger, rows, columns, rank, train)
        pattern = random_bits(rows, columns, torch.device("cuda"))
        linear = SparseLinear(randn(rows, columns // 2), pattern, backend=backend)
        del pattern
        run_products(linear.operands, factors, rows, columns, tokens, train)
        charge_operands(ledger, linear.operands, weights)
        return
    with ledger.allocation("values", weights):
        values = randn(rows, columns // 2)
    with ledger.allocation("row pattern", weights / 8):
        row_bits = random_bits(rows, columns, values.device)
    with ledger.allocation("column pattern", weights / 16):
        column_bits = choose_column_bits(values, row_bits, 2, 4)
    state = charge_training(ledger, values)
    factors, more_state = charge_adapters(ledger, rows, columns, rank, train)
    torch.cuda.empty_cache()
    operands = build_operands(backend, values, row_bits, column_bits)
    run_products(operands, factors, rows, columns, tokens, train)
    charge_operands(ledger, operands, weights, (values, row_bits, column_bits))
    del state, more_state


def activations(model, linear: Callable[[int, int, bool], torch.nn.Module], tokens: int) -> tuple[float, float, float]:
    """What one block keeps for its backward, and what training and inference take beside at their peak.

    Returns:
        kept after forward (its output included), the same counted from the tensors that autograd saved, and the peak of
        a forward without gradients.
    """
    from slope_megatron.bench.block import Block

    block = Block(model, linear)
    x = randn(tokens, model.hidden).requires_grad_()
    block(x).sum().backward()
    block.zero_grad(set_to_none=True)
    x.grad = None
    own = {tensor.data_ptr() for tensor in (*block.parameters(), *block.buffers(), x)}
    saved: dict[int, int] = {}

    def note(tensor):
        if tensor.is_cuda and tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = block(x)
    kept = torch.cuda.memory_allocated() - before
    saved[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
    del y
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        block(x)
    return kept, sum(saved.values()), torch.cuda.max_memory_allocated() - before
