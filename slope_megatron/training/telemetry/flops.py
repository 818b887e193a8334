"""Floating-point operations of one token in training, and the share of the device's peak that they reach (MFU).

Convention: a multiply-add is 2 operations. Counted are the blocks' linears, attention's two products over whole
sequences (causal or not), and the output layer; not the embedding look-up, norms, biases, softmax, the optimizer, nor
what recomputation does again. Backward is twice forward.

    dense-equivalent   as if nothing were sparse: what the dense twin would do (PaLM, appendix B, plus the output layer)
    actual             what sparse kernels multiply: an N:M product counts N/M of it. Forward and dgrad are such; wgrad
                       is in mode `full` (N:M of the output gradient along tokens), and dense in mode `paper`.
                       Adapters, once they have joined, add theirs. Baselines multiply dense matrices of masked weights

MFU = dense-equivalent operations per second / the device's dense peak, so a sparse model may exceed its dense twin's
ceiling; `mfu_actual` = actual operations per second / the same peak.
"""

import dataclasses

import torch

from slope_megatron.config import Config
from slope_megatron.config.slope import parse_nm
from slope_megatron.models.rules import sparse_linears
from slope_megatron.models.shapes import block_linears, padded_rows

# Dense tensor-core peaks in TFLOP/s by a part of the device's name; bf16, where the device has it, else fp16.
PEAKS = (("H200", 989.0), ("H100", 989.0), ("A100", 312.0), ("V100", 125.0))
# H100 cards other than SXM have lower peaks.
LOWER = ("PCIE", "NVL")


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations for one token, forward and backward."""

    dense_equivalent: float
    actual: float


def flops_per_token(config: Config, vocabulary: int, *, adapters: bool = False) -> Flops:
    """Operations per token of a training step.

    Args:
        vocabulary: entries of the tokenizer, for a model without a vocabulary of its own; padding is added here.
        adapters: whether the low-rank adapters take part.
    """
    model, slope = config.model, config.slope
    rows_out = padded_rows(model, vocabulary)
    # Scores and their product with the values: 2 products x 2 s h; three times for forward and backward.
    rest = 3 * (model.num_layers * 4 * config.data.seq_length * model.hidden_size + 2 * rows_out * model.hidden_size)
    dense, actual = float(rest), float(rest)
    gradient_n, gradient_m = slope.gradient_nm
    wgrad = gradient_n / gradient_m if slope.mode == "full" else 1.0
    for block in range(model.num_layers):
        sparse = sparse_linears(slope, block) if slope.packed else set()
        n, m = parse_nm(slope.for_block(block).nm)
        for name, linear in block_linears(model).items():
            product = 2.0 * linear.out * linear.width
            dense += 3 * product
            actual += product * ((2 * n / m + wgrad) if name in sparse else 3)
            if adapters and name in sparse:
                actual += 3 * 2.0 * slope.rank * (linear.out + linear.width)
    return Flops(dense, actual)


def peak_tflops(config: Config) -> float | None:
    """Dense peak of one device: as given, or of a GPU that is known; None: unknown."""
    if config.watch.peak_tflops:
        return config.watch.peak_tflops
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().upper()
    if "H100" in name and any(kind in name for kind in LOWER):
        return None
    return next((peak for part, peak in PEAKS if part in name), None)


def speed(flops: Flops, tokens_per_second: float, devices: int, peak: float | None) -> dict[str, float]:
    """TFLOP/s of each device, and MFU where the peak is known, for the metrics."""
    dense, actual = (count * tokens_per_second / devices / 1e12 for count in (flops.dense_equivalent, flops.actual))
    found = {"model_tflops": dense, "actual_tflops": actual}
    return {**found, "mfu": dense / peak, "mfu_actual": actual / peak} if peak else found
