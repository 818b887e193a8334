"""`slope pretrain`."""

import argparse
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from slope_megatron.cli.parser import BAD_INPUT
from slope_megatron.config import Config, add_config_arguments, read_config
from slope_megatron.versions import check_core

if TYPE_CHECKING:
    from slope_megatron.training.watch.launcher import Launcher

logger = logging.getLogger(__name__)
# As in sysexits.h. EX_TEMPFAIL: told to stop, the checkpoint is saved, start me again. EX_IOERR: the last checkpoint
# could not be written. EX_DATAERR: losses or gradients were not finite, step after step.
STOPPED_EARLY = 75
UNSAVED = 74
DIVERGED = 65
# As a shell has it of a process that TERM ended: told to stop, and nothing was saved.
STOPPED_UNSAVED = 143
# EX_OSERR: the device has no more memory.
OUT_OF_MEMORY = 71
# Megatron-LM's flags, and what they are here.
MEGATRON_FLAGS = {
    "--train-iters": "--steps",
    "--exit-interval": "--stop-at",
    "--eval-iters": "--eval-samples",
    "--save": "--out",
    "--load": "--resume",
    "--data-path": "--data",
    "--data-cache-path": "--cache",
    "--tensor-model-parallel-size": "--tensor-parallel",
    "--pipeline-model-parallel-size": "--pipeline-parallel",
    "--recompute-granularity": "--recompute",
    "--max-position-embeddings": "--max-positions",
    "--make-vocab-size-divisible-by": "--vocab-multiple",
    "--init-method-std": "--init-std",
    "--hidden-dropout": "--dropout",
    "--attention-dropout": "--dropout",
    "--disable-bias-linear": "--no-linear-bias",
    "--untie-embeddings-and-output-weights": "--no-tie-embeddings",
    "--lr-decay-style": "--lr-schedule",
    "--lr-warmup-iters": "--warmup-steps",
    "--lr-warmup-fraction": "--warmup-fraction",
    "--adam-beta1": "--beta1",
    "--adam-beta2": "--beta2",
    "--adam-eps": "--eps",
    "--bf16": "--dtype bf16",
    "--fp16": "--dtype fp16",
    "--tensorboard-dir": "--tensorboard",
}
USAGE = "slope pretrain --data FOLDER --out FOLDER [--config YAML ...] [OPTION ...]"
DESCRIPTION = """\
Pretrain a 2:4 sparse model (or, with --no-slope, its dense baseline) on prepared data.

A launcher (deepspeed, torchrun, srun, mpirun) starts this command once on every rank; without one it is the only rank.
The number of ranks is TP x PP x DP: --tensor-parallel and --pipeline-parallel are given, data parallelism takes the
rest. Values come from the defaults below, then YAML files (--config), then flags; the table printed at the start shows
each value and where it came from.
"""
EPILOG = """\
CONFIGURATION FILES (--config)
  YAML by section: slope, model, parallel, optimizer, data, train, watch (the groups of flags above, in this order). A
  key is its flag with underscores, in section slope without the prefix: --slope-nm 2:4 is nm below `slope:`.
    model: {hidden_size: 256, num_layers: 4, num_attention_heads: 4}
    slope: {nm: 2:4, adapter_rank: 16}
    optimizer: {lr: 6e-4}
  launch/models and launch/recipes hold published ones.

RUN FOLDER (--out)
  run.json             the configuration, its origins, versions, the command
  metrics.jsonl        one line every --log-interval steps, at validations, bad steps and jumps of the loss; a number
                       that is not finite is null. `epoch` and `consumed_tokens` count from step 0, `wall_seconds` over
                       all attempts
  checkpoints/         step_00000500/ and so on; `latest` names the newest complete one
  ranks/               heartbeats; failure.txt names the rank that died or hung
  summary.json, DONE   the run in figures, at its end; seconds and tokens/s over all `attempts`, which it lists, and
                       `unsaved`, why its last state is on no disk; DONE once all --steps are done and saved

  A folder that holds a run already is refused unless --resume, --auto-resume or --overwrite says what to do with it.

METRICS
  model_tflops   TFLOP/s of each device, as if the model were dense: 2 operations a multiply-add; linears, attention's
                 two products over whole sequences, the output layer; backward twice forward; neither embeddings nor
                 recomputation
  actual_tflops  what sparse kernels multiply of it, an N:M product counting N/M: forward and dgrad, wgrad in mode
                 `full` (dense in mode `paper`); baselines count as dense
  mfu            model_tflops / peak; mfu_actual: actual_tflops / peak

CHECKPOINTS
  One appears by one rename when every file of it is on disk, with checksums that every reader compares, and loads at
  any TP, PP and DP. Nothing in it is executed: an index or object that asks for more than data is refused.
  A save that fails (disk full, read-only) is logged, leaves older ones as they are, and is tried again at the next
  --save-interval. A state that is not finite is never saved. At most --keep-checkpoints are there, one more while it
  is written, and those of --keep-every. With --save-interval 0 none is written and no room is asked for: metrics,
  summary.json and DONE are all that is left, and --resume has nothing to go on from but what was there before.
  Where a dense start ends or a dense tail begins, one is written in any case: the run goes on from it.

SIGNALS
  USR1, TERM or HUP to any rank: all ranks save after the same step and end with code 75. TERM twice: end at once.
  A launcher that is killed, or dies of such a signal (torchrun of USR1), is missed within a second: the same.
  With --save-interval 0 the ranks end after that step, a line says that nothing is saved, and the code is 143.

EXIT CODES
   0  done, or stopped by --stop-at; a finished run that is resumed stays as it is
   2  bad input or configuration: one sentence says what; nothing was written. Or data found damaged while it trained
  65  --max-bad-steps in a row: the loss or gradients were not finite; the last good checkpoint is kept
  70  a rank died, or hung for --hang-timeout: named; go on with --resume
  71  a GPU has too little memory for this run: what was taken, and what to change
  74  the end was reached, and the last checkpoint could not be written
  75  stopped by USR1, TERM, HUP or the end of the launcher, and saved: start again with --resume (schedulers:
      --auto-resume)
 130  interrupted from the keyboard; nothing was saved
 143  told twice to end, or once with --save-interval 0; nothing was saved

EXAMPLES
  A small model on this machine:
    slope pretrain --data corpus --out runs/small --hidden-size 256 --num-layers 4 --num-attention-heads 4 --steps 200
  Four GPUs, two to a layer:
    deepspeed --num_gpus 4 --no_local_rank --module slope_megatron pretrain --config run.yaml --tensor-parallel 2
  The same under torchrun, going on from the newest checkpoint, at another layout:
    torchrun --nproc-per-node 4 -m slope_megatron pretrain --config run.yaml --tensor-parallel 4 --resume
  In a job that is requeued:
    slope pretrain --config run.yaml --auto-resume --save-interval 200 --keep-every 5000
"""


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "pretrain",
        help="train a model; started once on every rank",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("--brief", action="store_true", help="do not print the table of all values at the start")
    add_config_arguments(parser)
    parser.synonyms = MEGATRON_FLAGS
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
    if os.environ.get("RANK", "0") == "0":  # another rank may look when rank 0 has made the folder already
        from slope_megatron.training.checkpoint.run_folder import check_free

        check_free(config)
    rank, width = config.slope.rank, config.model.hidden_size
    if rank > width:
        logger.warning(
            "--slope-adapter-rank is %d and --hidden-size %d: adapters of a rank above the width add no more than a "
            "dense matrix does, and take more; give a smaller one",
            *(rank, width),
        )
    warmup = config.optimizer.warmup(config.train.steps)
    if warmup >= config.train.steps:
        logger.warning(
            "warm-up takes %d steps and the run has %d: the learning rate never leaves warm-up; give --warmup-steps",
            *(warmup, config.train.steps),
        )


def run(arguments: argparse.Namespace) -> int:
    # Chatter of the libraries that says nothing about this run (missing optional packages, deprecations): said as they
    # are imported.
    warnings.filterwarnings("default" if arguments.verbose else "ignore")
    os.environ.setdefault("DS_LOG_LEVEL", "info" if arguments.verbose else "error")
    from slope_megatron.training.watch.launcher import Launcher

    check_core()
    # Before the frameworks load, which takes a while: a rank whose launcher goes meanwhile would wait for the others.
    launcher = Launcher(arguments.ranks.variable)
    launcher.guard(STOPPED_EARLY)
    config, origins = read_config(arguments)
    check(config)
    if config.parallel.tensor_parallel > 1:
        # Kernels start in the order in which they were asked for: a collective before the product that hides it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from slope_megatron.integrations import cpu_host
    from slope_megatron.integrations.megatron_lm.args import value_table

    if not arguments.brief:
        logger.info("%s", value_table(config, origins))

    cpu_host.prepare()
    return train(config, origins, launcher)


def train(config: Config, origins: dict[str, str], launcher: "Launcher | None" = None) -> int:
    """Train; returns the exit code, and says on the first rank how it went."""
    from slope_megatron.training.checkpoint.finished import Finished
    from slope_megatron.training.checkpoint.saver import UNWANTED
    from slope_megatron.training.pretrain import pretrain
    from slope_megatron.training.telemetry.memory import OutOfMemory
    from slope_megatron.training.watch.bad_steps import Diverged
    from slope_megatron.training.watch.meeting import NotMet

    try:
        summary = pretrain(config, origins, launcher)
    except Finished as done:
        say(f"slope: {done}")
        return 0
    except Diverged as error:
        say(f"slope: error: {error}")
        return DIVERGED
    except (NotMet, OutOfMemory) as error:
        # On every rank: each has its own device, and one that has not met the first may be the only one to be heard.
        print(f"slope: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT if isinstance(error, NotMet) else OUT_OF_MEMORY
    loss = summary["val_loss"]
    found = "nothing validated" if loss is None else f"validation loss {loss:.4f} nats per token"
    say(f"{config.train.out}: step {summary['steps']}, {found}")
    if summary["unsaved"] == UNWANTED:
        return STOPPED_UNSAVED if summary["stopped_early"] else 0
    if summary["unsaved"]:
        say(f"slope: error: the last checkpoint could not be written: {summary['unsaved']}")
        return UNSAVED
    return STOPPED_EARLY if summary["stopped_early"] else 0


def say(line: str) -> None:
    """One line to the terminal, from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
