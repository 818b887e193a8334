"""Linears of others, called like those of linears.py: torch's own 2:4 tensors, and an FST-style one.

torch (`torch.sparse.SparseSemiStructuredTensor`, with its cuSPARSELt and its CUTLASS product):
    FromDense     compressed once. Its own backward has no dgrad (there is no compressed transpose), so training runs
                  our autograd function around its products: forward W, dgrad a second compressed tensor, dense wgrad
    StaticSort    torch's own training path: each forward prunes and packs both directions by 4 x 4 tiles
                  (`prune_dense_static_sort`) and its autograd does the rest; the gradient passes straight through
FST (Hu et al., arXiv 2404.01847), our re-implementation on this repository's kernels: the MLP's two linears alone,
    transposable masks (dgrad is exact), a dense parameter with a dense gradient, and MVUE of dY in wgrad. Masks are
    fixed here: choosing them anew, every 40 steps, is not timed.

Every peer multiplies right or is refused: `wrong` compares with the dense product.
"""

import functools

import torch
import torch.nn.functional as F
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from slope_kernels import cusparselt
from slope_megatron.bench.linears import DTYPE, fixed_rng
from slope_megatron.ops.autotune import measure
from slope_megatron.ops.autotune.trials import random_bits
from slope_megatron.ops.backend import build_operands
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.custom_ops import mvue
from slope_megatron.ops.custom_ops.products import choose_column, gather_kept, unpack_kept
from slope_megatron.sparsity.packing import pack_bits, unpack_bits
from slope_megatron.sparsity.transposable import patterns

# torch's own switch for row-major results, which the rest of a block wants.
SparseSemiStructuredTensor._FUSE_TRANSPOSE = True
# Both products round the same fp32 sums once to 16 bits.
MOST_RELATIVE_ERROR = 1e-2
Tensor24 = type[SparseSemiStructuredTensorCUSPARSELT | SparseSemiStructuredTensorCUTLASS]


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=DTYPE) * 0.02


def bias_of(rows: int, has_bias: bool) -> torch.nn.Parameter | None:
    return torch.nn.Parameter(random_weight(1, rows)[0]) if has_bias else None


class Straight(torch.autograd.Function):
    """Y = X W^T by `forward`, dX by `dgrad`, dW = dY^T X dense by `wgrad`, db = sum of dY: whoever computes them."""

    @staticmethod
    def forward(ctx, x, weight, bias, linear):
        ctx.save_for_backward(x)
        ctx.linear, ctx.has_bias = linear, bias is not None
        return linear.product(x, bias)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return ctx.linear.dgrad(dy), ctx.linear.wgrad(dy, x), dy.sum(0) if ctx.has_bias else None, None


class FromDense(torch.nn.Module):
    """torch's tensor, compressed once from a dense 2:4 weight; see the file's docstring."""

    tensor: Tensor24

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__()
        row_bits = random_bits(rows, columns, torch.device("cuda"))
        values = random_weight(rows, columns // 2)
        column_bits = choose_column(values, row_bits)
        dense = unpack_kept(values, row_bits)
        self.forward_operand = self.tensor.from_dense(dense)
        doubly = gather_kept(dense, row_bits) * unpack_bits(column_bits)
        self.backward_operand = self.tensor.from_dense(unpack_kept(doubly, row_bits).t().contiguous())
        self.weight = torch.nn.Parameter(dense)
        self.bias = bias_of(rows, bias)

    def forward(self, x):
        return Straight.apply(x, self.weight, self.bias, self)

    def product(self, x, bias):
        return F.linear(x, self.forward_operand, bias)

    def dgrad(self, dy):
        return F.linear(dy.contiguous(), self.backward_operand)

    def wgrad(self, dy, x):
        return dy.t() @ x

    def effective_weight(self) -> torch.Tensor:
        return self.weight.detach()


class TorchCusparselt(FromDense):
    tensor = SparseSemiStructuredTensorCUSPARSELT


class TorchCutlass(FromDense):
    tensor = SparseSemiStructuredTensorCUTLASS


class Sparsify(torch.autograd.Function):
    """A dense weight -> torch's 2:4 tensor of it; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, weight, tensor):
        return tensor.prune_dense_static_sort(weight)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class StaticSort(torch.nn.Module):
    """torch's training path; see the file's docstring."""

    tensor: Tensor24

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(random_weight(rows, columns))
        self.bias = bias_of(rows, bias)

    def forward(self, x):
        return F.linear(x, Sparsify.apply(self.weight, self.tensor), self.bias)

    def effective_weight(self) -> torch.Tensor:
        weight = self.weight.detach()
        bits = self.tensor.prune_dense_static_sort(weight).compressed_swizzled_bitmask
        if bits is None:
            raise RuntimeError(f"{self.tensor.__name__} says not which weights it keeps")
        return torch._sparse_semi_structured_apply_dense(weight, bits)


class TorchCusparseltTraining(StaticSort):
    tensor = SparseSemiStructuredTensorCUSPARSELT


class TorchCutlassTraining(StaticSort):
    tensor = SparseSemiStructuredTensorCUTLASS


def transposable_bits(rows: int, columns: int) -> torch.Tensor:
    """Bitmask uint8 `[N, K/8]` of a random transposable pattern."""
    table = patterns().bool().cuda()
    picked = torch.randint(len(table), (rows // 4, columns // 4), device="cuda")
    # [some, K/4, 4, 4] -> [4 some, K]: a tile's rows lie under each other.
    tiles = (table[some].unflatten(-1, (4, 4)).transpose(1, 2) for some in picked.split(256))
    return torch.cat([pack_bits(tile.flatten(0, 1).flatten(1)) for tile in tiles])


@functools.cache
def _wgrad_choice(key: Key, device: torch.device) -> Choice:
    """cuSPARSELt's or the dense product: our own kernels give no dense gradient."""
    return measure.measure(key, device, among=("cusparselt",))


def estimated_wgrad(dy, x, rng):
    """P(dY)^T X, or dY^T X where that is faster: dense `[N, K]`; whole blocks of 64 tokens."""
    (tokens, rows), columns = dy.shape, x.shape[1]
    assert tokens == cusparselt.padded_columns(tokens)
    choice = _wgrad_choice(Key(Product.WGRAD, rows, columns, tokens, dy.dtype), dy.device)
    if not choice.sparse:
        return dy.t() @ x
    assert isinstance(choice.algorithm, cusparselt.Algorithm)
    operand = mvue.mvue_operand(dy, rng.key, rng.streams, False)
    dw = x.new_empty((rows, columns))
    product = cusparselt.Product(rows, tokens, columns, x.dtype, x.device.index, columns, straight=True)
    stream = torch.cuda.current_stream().cuda_stream
    cusparselt.plan(product, choice.algorithm).run(operand.data_ptr(), x.data_ptr(), dw.data_ptr(), stream)
    return dw


class Fst(torch.nn.Module):
    """A linear of an FST-style MLP; see the file's docstring."""

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(random_weight(rows, columns))
        self.bias = bias_of(rows, bias)
        self.row_bits = transposable_bits(rows, columns)
        values = gather_kept(self.weight.detach(), self.row_bits)
        every = torch.full((rows, columns // 16), 255, dtype=torch.uint8, device="cuda")
        self.operands = build_operands("auto", values, self.row_bits, every)
        self.rng = fixed_rng(rows)

    def forward(self, x):
        return Straight.apply(x, self.weight, self.bias, self)

    def product(self, x, bias):
        operands = self.operands
        if bias is not None and hasattr(operands, "with_bias"):
            return operands.with_bias(bias).forward(x)
        y = operands.forward(x)
        return y if bias is None else y + bias

    def dgrad(self, dy):
        return self.operands.dgrad(dy)

    def wgrad(self, dy, x):
        return estimated_wgrad(dy, x, self.rng)

    def effective_weight(self) -> torch.Tensor:
        return unpack_kept(gather_kept(self.weight.detach(), self.row_bits), self.row_bits)


def wrong(linear: type) -> str | None:
    """What is wrong with a peer's forward and dgrad; None: nothing. Whatever it raises is a reason."""
    x = torch.randn(256, 512, device="cuda", dtype=DTYPE, requires_grad=True)
    dy = torch.randn(256, 256, device="cuda", dtype=DTYPE)
    try:
        made = linear(256, 512, True)
        y = made(x)
        weight = made.effective_weight().float()
        y.backward(dy)
    except Exception as error:  # each library has its own types
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    expected = x.detach().float() @ weight.t() + made.bias.detach().float()
    difference = relative(y, expected)
    if difference > MOST_RELATIVE_ERROR:
        return f"wrong results on this GPU: its Y differs by {difference:.1e} from the dense product's"
    # A doubly pruned transpose is not the forward's: its dX is compared by those whose dgrad is exact.
    if x.grad is None:
        return "wrong results on this GPU: it gives no dX"
    difference = relative(x.grad, dy.float() @ weight)
    if not isinstance(made, FromDense) and difference > MOST_RELATIVE_ERROR:
        return f"wrong results on this GPU: its dX differs by {difference:.1e}"
    return None


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().float() - expected).norm() / expected.norm())
