"""`slope`: one command, a subcommand a task. Bad input ends in one sentence and exit code 2."""

import argparse
import errno
import logging
import os
import sys

from slope_megatron import __version__
from slope_megatron.cli.parser import BAD_INPUT, Parser, manual

DESCRIPTION = """\
Sparse (2:4) pretraining of language models from the first step: SLoPe on megatron-core and DeepSpeed.

Start with `slope quickstart`: it prepares a corpus that every machine has, trains a small sparse model and its dense
baseline on 4 CPU ranks, and writes a report. Each command has a manual page: `slope COMMAND --help`.
"""
EPILOG = """\
examples:
  slope quickstart                                              the whole way once, in minutes, on any machine
  slope data prepare my_texts/ --out data/mine                  text into tokens
  slope pretrain --data data/mine --out runs/mine --steps 200   train
  slope generate runs/mine --prompt "def "                      text from the run
  slope export hf runs/mine exported                            a model for transformers
"""
CODES = """\
exit codes:
    0  done
    2  bad input: one sentence on standard error says what, and the way out (the traceback: slope --verbose COMMAND ...)
  130  interrupted from the keyboard
`slope pretrain --help` and `slope plan --help` list theirs besides.
"""
# What the file system says no with, and the way out.
WAYS_OUT = {
    errno.EACCES: "make it accessible to you, or give another path",
    errno.EPERM: "make it accessible to you, or give another path",
    errno.EROFS: "give a path on a file system that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of that path is a file: give another one",
    errno.EISDIR: "give the path of a file",
    errno.EEXIST: "give another path, or remove what is there",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOSPC: "free some space, or give a path on another disk",
    errno.EDQUOT: "free some space, or give a path on another disk",
}


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
        study,
    )

    parser = Parser(prog="slope", description=DESCRIPTION, epilog=manual(EPILOG, CODES))
    parser.add_argument("--version", action="version", version=f"slope-megatron {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what the libraries underneath say, too")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    makers = (quickstart, data, pretrain, import_model, export, generate, evaluate, report)
    for module in (*makers, study, plan, preflight, doctor, bench):
        module.add_parser(subcommands)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line; what a subcommand parses itself is left to it as `rest`."""
    arguments, rest = build_parser().parse_known_args(argv)
    arguments.rest = rest
    return arguments


def set_up_logging(verbose: bool) -> None:
    """Our own log lines on rank 0; the libraries' from warnings up, unless `--verbose`."""
    first = os.environ.get("RANK", "0") == "0"
    handler = AboveBars(sys.stderr)
    logging.basicConfig(format="%(message)s", level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    logging.getLogger("slope_megatron").setLevel(logging.INFO if first else logging.ERROR)


class AboveBars(logging.StreamHandler):
    """Writes a line above a progress bar that is being drawn, not behind it on the bar's own line."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:  # nothing draws bars
            super().emit(record)
            return
        from tqdm import tqdm

        tqdm.write(self.format(record), file=self.stream)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = parse(argv)
    try:
        if arguments.command == "pretrain":
            from slope_megatron.launch import ranks

            # Whatever launcher started this process, from here on RANK and its companions say so.
            arguments.ranks = ranks.export(os.environ)
        set_up_logging(arguments.verbose)
        return arguments.run(arguments)
    except ValueError as error:
        # Every rank refuses bad input with the same sentence: one says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"slope: error: {error}", file=sys.stderr)
        if arguments.verbose:
            raise
        return BAD_INPUT
    except OSError as error:
        sentence = refusal(error)
        # What a run cannot do in its middle is a fault, whose place the traceback tells.
        if sentence is None or arguments.verbose or arguments.command == "pretrain":
            raise
        print(f"slope: error: {sentence}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print(": ".join(["slope: interrupted", *map(str, stop.args)]), file=sys.stderr)
        return 130


def refusal(error: OSError) -> str | None:
    """What the file system refused, in one sentence; None for an error that is no path's."""
    if error.filename is None or error.errno not in WAYS_OUT:
        return None
    path = error.filename if isinstance(error.filename, str) else os.fsdecode(error.filename)
    return f"{path}: {os.strerror(error.errno)}; {WAYS_OUT[error.errno]}"
