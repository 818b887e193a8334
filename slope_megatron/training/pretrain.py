"""`slope pretrain`: the run from its first line to its summary."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from slope_megatron.config import Config
from slope_megatron.data.manifest import load_manifest
from slope_megatron.data.samples import datasets_for
from slope_megatron.models.provider import DTYPES, build_model
from slope_megatron.models.rules import sparsity_table
from slope_megatron.storage import folders, metadata, sums
from slope_megatron.training import deterministic, files, kernel_choices, parallel
from slope_megatron.training.checkpoint import disk, recovery, run_folder, store
from slope_megatron.training.checkpoint.finished import Finished, finished
from slope_megatron.training.checkpoint.init_from import check_init, load_init
from slope_megatron.training.data_check import DataCheck
from slope_megatron.training.engine import Engine
from slope_megatron.training.loop import Run, what_is_safe
from slope_megatron.training.telemetry import accounting, layer_stats, memory
from slope_megatron.training.telemetry.writers import Writer, check_installed, open_writers
from slope_megatron.training.together import Agreed, agreed, from_every_rank, on_first_rank
from slope_megatron.training.watch import process
from slope_megatron.training.watch.launcher import Launcher
from slope_megatron.training.watch.rank_watch import RankWatch

logger = logging.getLogger(__name__)


def resolve_dtype(config: Config) -> str:
    """What `--dtype auto` means here: a resumed run's own type, else bf16 on GPUs and fp32 on CPUs."""
    if config.train.dtype != "auto":
        return config.train.dtype
    saved = run_folder.saved_dtype(Path(config.train.out)) if run_folder.is_resumed(config) else None
    return saved or ("bf16" if torch.cuda.is_available() else "fp32")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What rank 0 found before anything is written, the same for all ranks.

    Args:
        dtype: of the parameters.
    """

    manifest: dict
    dtype: str


def make_plan(config: Config) -> Plan:
    """Rank 0 calls it.

    Raises:
        ValueError: a package is missing, the run cannot be written, or there is no such data.
    """
    check_installed(config)
    disk.probe(Path(config.train.out))
    return Plan(load_manifest(config.data.data), resolve_dtype(config))


def open_folder(config: Config, origins: dict[str, str], dtype: str, samples: int, locks: list) -> bool:
    """Open the run folder, and remove what an earlier process of this run left; rank 0 calls it.

    Args:
        samples: in the training dataset.
        locks: gets the folder's lock, which is held as long as the list is.
    Returns:
        whether the run goes on from a checkpoint of its own.
    Raises:
        ValueError: the run cannot start from `--init-from`, or the folder is not for this run.
    """
    run = Path(config.train.out)
    if config.train.init_from and not run_folder.is_resumed(config):
        check_init(config, samples, origins)
    locks.append(run_folder.open_run(config, origins, dtype))
    # Announcements of ranks, half a checkpoint.
    for path in (run / "ranks").glob("*"):
        path.unlink()
    store.remove_partial(run)
    return run_folder.is_resumed(config)


def pretrain(config: Config, origins: dict[str, str], launcher: Launcher | None = None) -> dict:
    """Train to `--steps` (or `--stop-at`); every rank calls it.

    Args:
        launcher: what started this rank, if anything did: the run saves and ends when that goes.
    Returns:
        the summary that is also written to RUN/summary.json.
    Raises:
        Finished: a run to be resumed has reached its last step before; nothing was written.
        ValueError: bad input, the same sentence on every rank, before anything is written.
    """
    if config.train.deterministic:
        deterministic.switch_on()
    parallel.initialize(config)
    run = Path(config.train.out)
    nothing_left = finished(config)
    if nothing_left:
        parallel.finish()
        raise Finished(nothing_left)
    plan = on_first_rank(lambda: make_plan(config))
    sizes = {name: entry["bytes"] for name, entry in plan.manifest["files"].items()}
    data_check = DataCheck(Path(config.data.data), sizes)
    # Before anything is written or built: a split may be too short for the sequence length.
    datasets = datasets_for(config)
    locks: list[run_folder.RunLock] = []  # held by rank 0 to the end of the run
    resumed = on_first_rank(lambda: open_folder(config, origins, plan.dtype, len(datasets[0]), locks))
    resume_from = recovery.find_checkpoint(config, run) if resumed else None
    vocabulary, timeout = plan.manifest["vocab_size"], config.watch.hang_timeout
    processes = from_every_rank(process.own(dist.get_rank()))
    watch = RankWatch(run, processes, dist.get_rank(), lambda: what_is_safe(run), timeout, launcher)
    watch.start()
    training = None
    try:
        with in_order(watch):
            logger.info("%s", sparsity_table(config))
            engine, start = build_watched(config, vocabulary, DTYPES[plan.dtype], datasets[0], resume_from)
            size = accounting.checkpoint_bytes(engine)
            writers: list = []
            on_first_rank(lambda: writers.extend(begin_writing(config, run, engine.steps_done, size)))
            kernel_choices.share(run, resumed=resume_from is not None)
            stats = layer_stats.LayerStats(engine, start) if start is not None else None
            training = Run(engine, run, datasets, vocabulary, watch, writers, stats, data_check)
            summary = train_watched(training)
    except Agreed:
        if training is None and resume_from is None and locks:
            folders.remove(run)  # nothing but its description is there yet
        raise
    summary["dtype"] = plan.dtype
    if dist.get_rank() == 0:
        write_results(run, summary, config.train.steps)
        for writer in writers:
            writer.close()
    leave(watch)
    return summary


def begin_writing(config: Config, run: Path, steps_done: int, checkpoint_bytes: int) -> list[Writer]:
    """The run's writers, once there is room for its checkpoints; rank 0 calls it.

    Raises:
        ValueError: there is not.
    """
    disk.check_space(run, checkpoint_bytes, config.train, steps_done)
    return open_writers(config, run, steps_done)


@contextlib.contextmanager
def in_order(watch: RankWatch) -> Iterator[None]:
    """What all ranks refuse alike ends the run in order: none takes another's end for a fault."""
    try:
        yield
    except (Agreed, sums.Damaged, metadata.Refused):
        leave(watch)
        raise


def train_watched(training: Run) -> dict:
    """`Run.train`, with what its failures mean for the other ranks and for the user."""
    engine, watch = training.engine, training.watch
    try:
        return training.train()
    except torch.OutOfMemoryError:
        held = memory.measure(engine.device)
        reason = memory.explain(engine.config, dist.get_rank(), f"in step {engine.steps_done + 1}", held)
        raise memory.OutOfMemory(f"{reason}. {what_is_safe(training.run)}") from None
    except RuntimeError:
        watch.await_report()
        raise


def build_watched(config: Config, *arguments):
    """`build_engine`, with what running out of memory means for the user."""
    try:
        return build_engine(config, *arguments)
    except torch.OutOfMemoryError:
        held = memory.measure(torch.cuda.current_device())
        raise memory.OutOfMemory(memory.explain(config, dist.get_rank(), "building the model", held)) from None


def build_engine(config: Config, vocabulary: int, dtype: torch.dtype, train_set, resume_from: Path | None):
    """The engine at the step that the run begins with, and for the layers' figures what its weights began with."""
    model = build_model(config, vocabulary, dtype)
    wants_layers = config.watch.layer_stats_interval > 0
    if config.train.init_from and (wants_layers or not resume_from):
        agreed(lambda: load_init(model, config, vocabulary, train_set))
    start = layer_stats.sample_all(model) if wants_layers else None
    engine = Engine(model, config, dtype)
    if resume_from:
        recovery.load(engine, resume_from)
    return engine, start


def leave(watch: RankWatch) -> None:
    """All ranks end together: none takes another's end for a fault."""
    dist.barrier()
    watch.stop()
    parallel.finish()


def write_results(run: Path, summary: dict, steps: int) -> None:
    """summary.json, and DONE for whoever starts jobs; a disk that refuses them is in the summary."""
    try:
        files.write_json(run / "summary.json", summary)
        if summary["steps"] == steps and not summary["unsaved"]:
            files.write_text(run / "DONE", f"{steps} steps\n")
    except OSError as error:
        summary["unsaved"] = summary["unsaved"] or files.reason(error)
