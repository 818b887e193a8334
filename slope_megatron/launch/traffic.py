"""Bytes that one rank sends to the other replicas in a step, by formula.

P parameters of this rank (packed ones counted as kept values), D replicas, M micro-batches; b bytes of a weight, g of a
gradient on its way (`--grad-reduce-dtype`). A ring's share is (D - 1) / D of the whole, twice for an all-reduce.

          gradients                                            weights
ZeRO-1    2 g P      one all-reduce a step                     b P     gathered after the update
ZeRO-2    2 g P M    DeepSpeed all-reduces each micro-batch's  b P
ZeRO-3    g P M      each micro-batch's are reduce-scattered   2 b P M   gathered in every forward and every backward

DeepSpeed spares ZeRO-3's second gather where it has at most 1e9 gathered elements to keep: that is not counted.
"""


def data_parallel_bytes(
    parameters: float, replicas: int, zero: int, micro_batches: int, weight: int, reduced: int
) -> dict[str, float]:
    """What is sent for "gradients" and for "weights".

    Args:
        zero: stage.
        weight, reduced: bytes of a weight, and of a gradient on its way.
    """
    whole = parameters * (replicas - 1) / replicas
    if zero == 3:
        return {"gradients": micro_batches * reduced * whole, "weights": 2 * micro_batches * weight * whole}
    times = 1 if zero == 1 else micro_batches
    return {"gradients": 2 * times * reduced * whole, "weights": weight * whole}
