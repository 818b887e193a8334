"""Bytes that one rank sends to the other replicas in a step, by formula.

P parameters of this rank (packed ones counted as kept values), D replicas, M micro-batches; b bytes of a weight, g of a
gradient on its way (`--grad-reduce-dtype`). A ring's share is (D - 1) / D of the whole, twice for an all-reduce.

          gradients                                            weights
ZeRO-1    g P        bf16: one reduce-scatter a step           b P     gathered after the update
          2 g P      fp32, fp16: one all-reduce a step         b P
ZeRO-2    2 g P M    DeepSpeed all-reduces each micro-batch's  b P
ZeRO-3    g P M      each micro-batch's are reduce-scattered   2 b P M   gathered in every forward and every backward

DeepSpeed spares ZeRO-3's second gather where it has at most 1e9 gathered elements to keep: that is not counted.
"""

from slope_megatron.config.parallel import reduced_dtype

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def data_parallel_bytes(
    parameters: float, replicas: int, zero: int, micro_batches: int, dtype: str, grad_reduce_dtype: str
) -> dict[str, float]:
    """What is sent for "gradients" and for "weights".

    Args:
        zero: stage.
        dtype: of the weights.
        grad_reduce_dtype: as the setting has it.
    """
    whole = parameters * (replicas - 1) / replicas
    weight, gradient = BYTES[dtype], BYTES[reduced_dtype(grad_reduce_dtype, dtype, zero)]
    scattered = zero == 3 or (zero == 1 and dtype == "bf16")
    reductions = (1 if scattered else 2) * (1 if zero == 1 else micro_batches)
    gathers = 2 * micro_batches if zero == 3 else 1
    return {"gradients": reductions * gradient * whole, "weights": gathers * weight * whole}
