"""Whole blocks of others and of this project in one run: training and forward alone, each against torch's dense block.

Peers are in peers.py, this project's modes in linears.py. Each peer alternates with the dense block. `ratio` is from
replayed CUDA graphs, where what Python and a library's set-up cost the host does not count; `eager_ratio` is as
launched from Python, the dense block too. A peer that cannot run, or gives wrong results, has a row with the reason.
"""

import gc
import sys

from slope_megatron.bench.common import bar_chart, machine, print_table, rounded, write_csv
from slope_megatron.bench.models import MODELS, TINY, Model
from slope_megatron.bench.progress import Clock, add_budget, begin

NOTES = {
    "torch-cusparselt": "torch's 2:4 tensor, compressed once; our autograd around its products",
    "torch-cutlass": "torch's 2:4 tensor with CUTLASS; our autograd around its products",
    "torch-cusparselt-training": "torch's own training path: pruned and packed in every forward",
    "torch-cutlass-training": "torch's own training path with CUTLASS",
    "fst-style": "MLP alone, transposable masks, MVUE wgrad, dense parameter; our re-implementation on our kernels",
    "te-bf16": "Transformer Engine's own dense block",
    "te-fp8": "Transformer Engine's own dense block, products in e4m3 with current scaling",
}


def add_arguments(parser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="models to time")
    parser.add_argument("--peers", nargs="+", help="some of the peers and modes; default: all")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens T, in sequences of 2048")
    parser.add_argument("--blocks", type=int, default=1, help="blocks in a stack; times are per block")
    parser.add_argument("--accumulate", default="fp32", choices=("fp32", "bf16", "none"))
    parser.add_argument("--rounds", type=int, default=7, help="samples of each")
    add_budget(parser)
    parser.add_argument("--out", help="folder for the CSV and the chart; default: the current one")


def all_peers() -> dict:
    """{name: linear, one for each linear of a block, or a whole block}; of what is not installed, a line instead."""
    from slope_megatron.bench import peers, te_block
    from slope_megatron.bench.linears import MODES

    mlp_alone = {"qkv": MODES["dense"], "proj": MODES["dense"], "fc1": peers.Fst, "fc2": peers.Fst}
    others = {
        "torch-cusparselt": peers.TorchCusparselt,
        "torch-cusparselt-training": peers.TorchCusparseltTraining,
        "torch-cutlass": peers.TorchCutlass,
        "torch-cutlass-training": peers.TorchCutlassTraining,
        "fst-style": mlp_alone,
    }
    if te_block.is_installed():
        others |= {"te-bf16": te_block.TeBlock, "te-fp8": te_block.TeFloat8Block}
    else:
        print("Transformer Engine is not installed: its blocks, te-bf16 and te-fp8, are left out", file=sys.stderr)
    return others | {mode: linear for mode, linear in MODES.items() if mode != "dense"}


def reasons(wanted: dict, clock: Clock) -> dict[str, str | None]:
    """Each peer's reason for being refused; None: it runs and multiplies right. This project's modes have tests."""
    from slope_megatron.bench import peers, te_block

    found = dict.fromkeys(wanted)
    for name, kind in wanted.items():
        if name in NOTES:
            if name.startswith("te-"):
                found[name] = te_block.wrong(kind, TINY)
            else:
                found[name] = peers.wrong(kind["fc1"] if isinstance(kind, dict) else kind)
            clock.say(f"{name}: {found[name] or 'runs'}")
    return found


def timed_pair(dense, stack, name: str, arguments, eager: bool) -> tuple[list[float], list[float]]:
    """Samples (ms a block) of the dense stack and of a peer's, in turn."""
    from slope_megatron.bench.block import captured
    from slope_megatron.ops.autotune import timing

    functions = {}
    for label, one in (("dense", dense), ("peer", stack)):
        function = getattr(one, name)
        function()
        functions[label] = function if eager else captured(function).replay
    rough = timing.median(timing.interleaved(functions, rounds=3, calls=1)["dense"])
    samples = timing.interleaved(functions, rounds=arguments.rounds, calls=timing.calls_for(rough, target=30.0))
    dense_ms, peer_ms = ([ms / arguments.blocks for ms in samples[label]] for label in ("dense", "peer"))
    return dense_ms, peer_ms


def peer_rows(model: Model, peer: str, linear, dense, arguments) -> list[dict]:
    from slope_megatron.bench.block import Stack
    from slope_megatron.ops.autotune import timing

    stack = Stack(model, linear, arguments.blocks, arguments.tokens, arguments.accumulate)
    rows = []
    for name in ("train", "forward"):
        row = {"model": model.name, "peer": peer, "pass": name, "tokens": arguments.tokens}
        for prefix, eager in (("", False), ("eager_", True)):
            dense_samples, samples = timed_pair(dense, stack, name, arguments, eager)
            ratios = [one / other for one, other in zip(dense_samples, samples, strict=True)]
            dense_ms, ms = timing.median(dense_samples), timing.median(samples)
            row |= {f"{prefix}dense_ms": dense_ms, f"{prefix}ms": ms, f"{prefix}ratio": dense_ms / ms}
            row |= {f"{prefix}spread": timing.spread(ratios)}
        rows.append(rounded(row) | {"refused": "", "note": NOTES.get(peer, "this project")})
    return rows


def refused_row(model: Model, peer: str, reason: str, tokens: int) -> dict:
    empty = {f"{prefix}{name}": "" for prefix in ("", "eager_") for name in ("dense_ms", "ms", "ratio", "spread")}
    row = {"model": model.name, "peer": peer, "pass": "both", "tokens": tokens}
    return row | empty | {"refused": reason, "note": NOTES.get(peer, "this project")}


def timed_or_refused(model: Model, peer: str, linear, dense, reason: str | None, arguments) -> list[dict]:
    """A peer's rows on one model, or the row with the reason why it has none."""
    import torch

    try:
        if reason is None:
            return peer_rows(model, peer, linear, dense, arguments)
    except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
        # Of a library's own: a shape that it does not take, say; or a mode whose backend cannot run here.
        if isinstance(error, torch.AcceleratorError):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return [refused_row(model, peer, reason, arguments.tokens)]


def main(arguments) -> int:
    clock = begin(arguments)
    import torch

    from slope_megatron.bench.block import Stack
    from slope_megatron.bench.linears import MODES

    known = all_peers()
    unknown = set(arguments.peers or ()) - set(known)
    if unknown:
        raise ValueError(f"--peers holds {sorted(unknown)[0]!r}: there are {', '.join(known)}")
    wanted = {name: known[name] for name in arguments.peers or known}
    refused, rows = reasons(wanted, clock), []
    for name in clock.within(arguments.models):
        model = MODELS[name]
        dense = Stack(model, MODES["dense"], arguments.blocks, arguments.tokens, arguments.accumulate)
        for peer, linear in wanted.items():
            news = timed_or_refused(model, peer, linear, dense, refused[peer], arguments)
            rows += news
            clock.say(f"{name} {peer}: {', '.join(row['refused'] or str(row['ratio']) for row in news)}")
            path = write_csv("peers", rows, arguments.out)
            gc.collect()
            torch.cuda.empty_cache()
        del dense
    print_table(rows, ["model", "peer", "pass", "dense_ms", "ms", "ratio", "spread", "eager_ratio", "refused"])
    timed = [row for row in rows if not row["refused"] and row["pass"] == "train"]
    labels = list(dict.fromkeys(row["model"] for row in timed))
    ratios = {(row["model"], row["peer"]): row["ratio"] for row in timed}
    series = {peer: [ratios.get((label, peer), 0.0) for label in labels] for peer in wanted if not refused[peer]}
    bar_chart("peers", labels, series, f"training block; {machine()}", arguments.out)
    print(f"wrote {path}")
    return 0
