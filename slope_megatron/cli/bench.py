"""`slope bench`: 2:4 products and blocks against dense ones on this machine."""

import argparse
import importlib

from slope_megatron.cli.parser import Parser, manual

BENCHMARKS = {
    "gemm": "every linear of the models, its three products, at each tensor-parallel size",
    "model": "whole models as `slope pretrain` trains them, dense and 2:4: tokens/s, MFU, memory",
    "block": "whole transformer blocks, training and forward alone",
    "parallel": "training steps on several GPUs: tensor parallel, and replicas from one up",
    "peers": "blocks of torch's 2:4 tensors, an FST-style MLP, Transformer Engine and this project's modes, in one run",
    "decode": "prefill and decoding of a few blocks at inference",
    "refresh": "kernels that move weights, as a share of copy bandwidth",
}
DESCRIPTION = """\
Time 2:4 products, blocks and steps against dense ones on this machine's GPU. Dense and sparse alternate in one run;
results go to a CSV file and a chart. A machine that has nothing to measure is refused with the reason. Each benchmark
has flags of its own: `slope bench gemm --help`.
"""
EXAMPLES = """\
examples:
  slope bench model --model opt-2.6b --out measured
  slope bench gemm --models opt-2.6b --tensor-parallel 1 --out measured
  slope bench block --models opt-13b --modes paper full --out measured
  slope plan --cluster mine.env --rates measured/gemm.csv          the planner with these rates
"""


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "bench",
        help="time sparse products, blocks and steps against dense ones",
        description=DESCRIPTION,
        epilog=manual(EXAMPLES),
    )
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, text in BENCHMARKS.items():
        # The benchmark's own flags are parsed by it, when it runs: it imports torch, this parser must not.
        kind = kinds.add_parser(name, help=text, add_help=False)
        kind.set_defaults(rest_is_mine=True)
    parser.set_defaults(run=run, rest_is_mine=True)


def load(name: str):
    """The benchmark's module."""
    return importlib.import_module(f"slope_megatron.bench.bench_{name}")


def run(arguments: argparse.Namespace) -> int:
    name = arguments.benchmark
    benchmark = load(name)
    parser = Parser(
        prog=f"slope bench {name}",
        description=benchmark.__doc__,
        epilog=manual(EXAMPLES),
    )
    benchmark.add_arguments(parser)
    return benchmark.main(parser.parse_args(arguments.rest))
