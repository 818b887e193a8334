"""Measuring the candidates for one product in e4m3: the dense one, and 2:4 with the library's algorithms.

T tokens, R rows and S columns of the operand. The same contest behind the same gate as in `measure`, whose docstring
says why; the error that is allowed is larger, since fp8 tensor cores keep fewer bits of their sums.
"""

import dataclasses
import logging

import torch

from slope_kernels import cusparselt
from slope_megatron.ops import float8_products, layout, measure, products, timing
from slope_megatron.ops.choices import Choice, Key
from slope_megatron.sparsity import float8
from slope_megatron.sparsity.float8 import E4M3
from slope_megatron.sparsity.operand import metadata_e4m3, slot_places
from slope_megatron.sparsity.packing import unpack_bits

logger = logging.getLogger(__name__)
# Sums of e4m3 products err by 1.5e-3 at 9216 terms, 2:4 and dense alike, rounding to bf16 by 1.7e-3.
MOST_RELATIVE_ERROR = 8e-3
MOST_ELEMENT_ERROR = 5e-2


@dataclasses.dataclass
class Trial:
    """Random data of one product: q, the operand, the dense weight, their scales, room for Y, and the right Y."""

    key: Key
    q_TS: torch.Tensor
    operand: torch.Tensor
    w_RS: torch.Tensor
    scale: torch.Tensor
    y_TR: torch.Tensor
    expected_TR: torch.Tensor
    most_relative_error: float = MOST_RELATIVE_ERROR
    most_element_error: float = MOST_ELEMENT_ERROR

    def dense_product(self) -> torch.Tensor:
        return float8_products.dense_mm(self.q_TS, self.w_RS, self.scale, self.scale, None, self.y_TR.dtype)


def random_e4m3(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return float8.quantize(torch.randn(rows, columns, device=device, dtype=torch.bfloat16))[0]


def prepare(key: Key, output: torch.dtype, device: torch.device) -> Trial:
    """Fresh random data. The right Y is a product of 16-bit tensor cores, which hold every e4m3 value."""
    row_bits = measure.random_bits(key.rows, key.columns, device)
    values = random_e4m3(key.rows, key.columns // 2, device)
    operand = torch.empty(layout.operand_bytes(key.rows, key.columns, E4M3), dtype=torch.uint8, device=device)
    layout.values_of(operand, key.rows, key.columns, 1, E4M3).copy_(values[None])
    if layout.probe(device, E4M3).known_metadata:
        metadata = metadata_e4m3(products.row_metadata(row_bits), key.rows, key.columns // 4)
    else:
        metadata = layout.library_metadata(slot_places(unpack_bits(row_bits)), E4M3)
    layout.metadata_of(operand, key.rows, key.columns, 1).copy_(metadata[None])
    dense = products.unpack_kept(values.to(torch.bfloat16), row_bits)
    q = random_e4m3(cusparselt.padded_tokens(key.tokens), key.columns, device)
    # Of the size that a layer's scales have: their product keeps Y in the range of fp16.
    scale = torch.full((1,), 2.0**-9, device=device)
    expected = (q.to(torch.bfloat16) @ dense.t()).mul_(2.0**-18).to(output)
    room = torch.empty_like(expected)
    return Trial(key, q.view(torch.uint8), operand, dense.to(E4M3), scale, room, expected)


class Candidate:
    """A 2:4 product of a trial by one algorithm."""

    def __init__(self, trial: Trial, algorithm: cusparselt.Algorithm | None):
        from slope_kernels.triton.quantize import rescale

        key, y = trial.key, trial.y_TR
        self.trial, self.algorithm = trial, algorithm
        product = cusparselt.Product(key.rows, key.columns, y.shape[0], E4M3, y.device.index, key.rows, output=y.dtype)
        self.plan = cusparselt.Plan(product, algorithm)
        self.rescale = rescale

    def __call__(self) -> None:
        """The product and the pass that scales it: the dense candidate scales its own."""
        trial = self.trial
        stream = torch.cuda.current_stream(trial.y_TR.device).cuda_stream
        addresses = (tensor.data_ptr() for tensor in (trial.operand, trial.q_TS, trial.y_TR))
        self.plan.run(*addresses, stream)
        self.rescale(trial.y_TR, trial.scale, trial.scale, 1.0 / cusparselt.E4M3_FACTOR, None)


def contest(key: Key, output: torch.dtype, device: torch.device, *, rounds: int = 9) -> dict:
    """Times (ms, one a round) of the dense product, "dense", and of each sparse finalist, (1 tile, algorithm)."""
    trial = prepare(key, output, device)
    finalists = measure.finalists(key, lambda algorithm: Candidate(trial, algorithm))
    functions = {"dense": trial.dense_product, **{(1, candidate.algorithm): candidate for candidate in finalists}}
    rough = timing.median(timing.interleaved({"": trial.dense_product}, rounds=3, calls=1)[""])
    return timing.interleaved(functions, rounds=rounds, calls=timing.calls_for(rough))


def measure_product(key: Key, output: torch.dtype, device: torch.device, *, dense_allowed: bool = True) -> Choice:
    """Measure a product's candidates and choose."""
    choice = measure.pick(key, contest(key, output, device), dense_allowed=dense_allowed)
    # The trial's tensors are large and of sizes that training will not ask for again.
    torch.cuda.empty_cache()
    return choice
