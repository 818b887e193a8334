"""What low-rank adapters cost a 2:4 block: the speed that is kept, relative to the same block without them, and bounds.

flop_bound    the adapters' products at the rate that dense products reach in the same run, and nothing else
byte_bound    X read and Y written once more for each pair of products (and X and dY read once more for the
              adapters' gradients) at the measured copy bandwidth, and nothing else
"""

from slope_megatron.bench.models import Model


def rank_of(model: Model, share: float) -> int:
    return max(1, round(model.hidden * share / 100))


def adapter_work(model: Model, rank: int, tokens: int, train: bool) -> tuple[float, float]:
    """Floating-point operations, and bytes as in the file's docstring, that adapters add to a block."""
    widths = sum(rows + columns for rows, columns in model.linears().values())
    pairs = 3 if train else 1
    return pairs * 2.0 * tokens * rank * widths, pairs * 2.0 * tokens * widths


def dense_rate(model: Model, tokens: int) -> float:
    """Floating-point operations a ms of the run's dense forward and dgrad products."""
    from slope_megatron.bench.linears import DTYPE
    from slope_megatron.ops.choices import Key, Product, find

    flops, ms = 0.0, 0.0
    for rows, columns in model.linears().values():
        for key in (
            Key(Product.FORWARD, rows, columns, tokens, DTYPE),
            Key(Product.DGRAD, columns, rows, tokens, DTYPE),
        ):
            flops += 2.0 * rows * columns * tokens
            choice = find(key)
            if choice is None or choice.dense_ms is None:
                raise RuntimeError(f"{key} was not timed against the dense product: run the block once before")
            ms += choice.dense_ms
    return flops / ms


def kept_speed(model: Model, share: float, name: str, samples: dict, tokens: int, bandwidth: float) -> dict:
    """Columns of a block with adapters of `share` % of its width, whose samples are beside those of `paper`."""
    from slope_megatron.ops.autotune import timing

    alone = timing.median(samples["paper"])
    flops, moved = adapter_work(model, rank_of(model, share), tokens, name == "train")
    return {
        "rank": rank_of(model, share),
        "kept": alone / timing.median(samples[mode_of(share)]),
        "flop_bound": alone / (alone + flops / dense_rate(model, tokens)),
        "byte_bound": alone / (alone + moved / bandwidth * 1e3),
    }


def mode_of(share: float) -> str:
    """What the block with such adapters is called among the modes."""
    return f"paper + {share} %"
