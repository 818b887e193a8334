"""`slope`: one command, a subcommand a task. Bad input ends in one sentence and exit code 2."""

import argparse
import logging
import os
import sys

from slope_megatron import __version__

DESCRIPTION = """\
Sparse (2:4) pretraining of language models from the first step: SLoPe on megatron-core and DeepSpeed.

Start with `slope quickstart`: it prepares a corpus that every machine has, trains a small sparse model and its dense
twin on 4 CPU ranks, and writes a report.
"""
BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    from slope_megatron.cli import (
        bench,
        data,
        doctor,
        evaluate,
        export,
        generate,
        import_model,
        plan,
        preflight,
        pretrain,
        quickstart,
        report,
    )

    parser = argparse.ArgumentParser(
        prog="slope",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"slope-megatron {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what the libraries underneath say, too")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    makers = (quickstart, data, pretrain, import_model, export, generate, evaluate, report)
    for module in (*makers, plan, preflight, doctor, bench):
        module.add_parser(subcommands)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line; what a subcommand parses itself is left to it as `rest`."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "rest_is_mine", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    return arguments


def set_up_logging(verbose: bool) -> None:
    """Our own log lines on rank 0; the libraries' from warnings up, unless `--verbose`."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr)
    logging.getLogger("slope_megatron").setLevel(logging.INFO if first else logging.ERROR)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = parse(argv)
    try:
        if arguments.command == "pretrain":
            from slope_megatron.launch import ranks

            # Whatever launcher started this process, from here on RANK and its companions say so.
            ranks.export(os.environ)
        set_up_logging(arguments.verbose)
        return arguments.run(arguments)
    except ValueError as error:
        # Every rank refuses bad input with the same sentence: one says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"slope: error: {error}", file=sys.stderr)
        if arguments.verbose:
            raise
        return BAD_INPUT
    except KeyboardInterrupt:
        print("slope: interrupted", file=sys.stderr)
        return 130
