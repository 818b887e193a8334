"""`slope pretrain`."""

import argparse
import logging
import os
import sys
import warnings

from slope_megatron.config import Config, add_config_arguments, read_config

logger = logging.getLogger(__name__)
# As in sysexits.h. EX_TEMPFAIL: told to stop, the checkpoint is saved, start me again. EX_IOERR: the last checkpoint
# could not be written. EX_DATAERR: losses or gradients were not finite, step after step.
STOPPED_EARLY = 75
UNSAVED = 74
DIVERGED = 65
EPILOG = """\
examples:
  slope pretrain --data corpus --out runs/small --hidden-size 256 --num-layers 4 --num-attention-heads 4 --steps 200
  deepspeed --num_gpus 4 --no_local_rank --module slope_megatron pretrain --config run.yaml --tensor-parallel 2
  torchrun --nproc-per-node 4 -m slope_megatron pretrain --config run.yaml --tensor-parallel 2 --out runs/tp2 --resume

USR1 or TERM to any rank saves a checkpoint after the current step and ends the run with exit code 75; a finished run
leaves a file DONE in its folder; `--auto-resume` goes on where there is a checkpoint and starts where there is none.

Values come from defaults, then YAML files (`--config`), then flags. TP x DP is the number of ranks that were started.
"""


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "pretrain",
        help="train a model; started once on every rank",
        description="Pretrain a 2:4 sparse model (or, with --no-slope, its dense twin) on prepared data.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--brief", action="store_true", help="do not print the table of all values at the start")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def check(config: Config) -> None:
    """Refuse what can be refused in a moment: before the frameworks load, and before any rank waits for another.

    Raises:
        ValueError: one sentence.
    """
    from slope_megatron.data.manifest import load_manifest

    if not config.train.out:
        raise ValueError("no run folder: give --out FOLDER")
    if not config.data.data:
        raise ValueError("no data: give --data FOLDER, a folder that `slope data prepare` wrote")
    load_manifest(config.data.data)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config.data.micro_batches(config.parallel.data_parallel(ranks))


def run(arguments: argparse.Namespace) -> int:
    config, origins = read_config(arguments)
    check(config)
    # Chatter of the libraries that says nothing about this run (missing optional packages, deprecations).
    warnings.filterwarnings("default" if arguments.verbose else "ignore")
    os.environ.setdefault("DS_LOG_LEVEL", "info" if arguments.verbose else "error")
    from slope_megatron.launch.megatron_args import value_table
    from slope_megatron.training import cpu_host

    if not arguments.brief:
        logger.info("%s", value_table(config, origins))

    if cpu_host.prepare():
        # torch.compile of small pointwise functions costs more than it gives on CPUs.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from slope_megatron.training.pretrain import pretrain
    from slope_megatron.training.watch import Diverged

    try:
        summary = pretrain(config, origins)
    except Diverged as error:
        say(f"slope: error: {error}")
        return DIVERGED
    say(f"{config.train.out}: step {summary['steps']}, validation loss {summary['val_loss']:.4f} nats per token")
    if summary["unsaved"]:
        say(f"slope: error: the last checkpoint could not be written: {summary['unsaved']}")
        return UNSAVED
    return STOPPED_EARLY if summary["stopped_early"] else 0


def say(line: str) -> None:
    """One line to the terminal, from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
