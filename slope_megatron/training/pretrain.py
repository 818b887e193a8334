"""`slope pretrain`: the run from its first line to its summary."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from slope_megatron.config import Config
from slope_megatron.data.manifest import load_manifest
from slope_megatron.data.samples import datasets_for
from slope_megatron.models.layer_spec import weights_to_prune
from slope_megatron.models.provider import DTYPES, build_model, padded_vocabulary
from slope_megatron.models.rules import sparsity_table
from slope_megatron.ops.backend import check_weight
from slope_megatron.sparsity.packing import pack_bits
from slope_megatron.storage import folders, metadata, sums, whole
from slope_megatron.training import deterministic, kernel_choices, parallel
from slope_megatron.training.checkpoint import disk, recovery, run_folder, store
from slope_megatron.training.checkpoint.finished import Finished, finished
from slope_megatron.training.checkpoint.init_from import check_init, load_init
from slope_megatron.training.checkpoint.saver import UNWANTED
from slope_megatron.training.data_check import DataCheck
from slope_megatron.training.engine import Engine
from slope_megatron.training.loop import Run
from slope_megatron.training.teardown import Remains
from slope_megatron.training.telemetry import accounting, console, layer_stats, memory
from slope_megatron.training.telemetry.writers import check_installed, open_writers
from slope_megatron.training.together import Agreed, agreed, from_every_rank, on_first_rank
from slope_megatron.training.watch import process
from slope_megatron.training.watch.launcher import Launcher
from slope_megatron.training.watch.rank_watch import RankWatch
from slope_megatron.training.zero import partitions

logger = logging.getLogger(__name__)


def resolve_dtype(config: Config) -> str:
    """What `--dtype auto` means here: a resumed run's own type, else bf16 on GPUs and fp32 on CPUs."""
    if config.train.dtype != "auto":
        return config.train.dtype
    saved = run_folder.saved_dtype(Path(config.train.out)) if run_folder.is_resumed(config) else None
    return saved or ("bf16" if torch.cuda.is_available() else "fp32")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What rank 0 finds for all ranks before anything is written: the data's manifest, the parameters' type."""

    manifest: dict
    dtype: str

    @classmethod
    def make(cls, config: Config) -> "Plan":
        """
        Raises:
            ValueError: a package is missing, the run cannot be written, there is no such data, or the model has too few
                tokens for it.
        """
        check_installed(config)
        disk.probe(Path(config.train.out))
        manifest = load_manifest(config.data.data)
        padded_vocabulary(config.model, manifest["vocab_size"])
        return cls(manifest, resolve_dtype(config))


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
        check_init(config.form_at(0), samples, origins)
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
    if nothing_left := finished(config):
        parallel.finish()
        raise Finished(nothing_left)
    plan = on_first_rank(lambda: Plan.make(config))
    sizes = {name: entry["bytes"] for name, entry in plan.manifest["files"].items()}
    data_check = DataCheck(Path(config.data.data), sizes)
    # Before anything is written or built: a split may be too short for the sequence length.
    datasets = datasets_for(config)
    locks: list[run_folder.RunLock] = []  # held by rank 0 to the end of the run
    resumed = on_first_rank(lambda: open_folder(config, origins, plan.dtype, len(datasets[0]), locks))
    resume_from = recovery.find_checkpoint(config, run) if resumed else None
    timeout, rank = config.watch.hang_timeout, dist.get_rank()
    processes, saves = from_every_rank(process.own(rank)), config.train.save_interval > 0
    watch = RankWatch(run, processes, rank, lambda: recovery.what_is_safe(run), timeout, launcher, saves)
    watch.start()
    training = None
    try:
        with in_order(watch):
            logger.info("%s", sparsity_table(config))
            training = begin(config, plan, datasets, resume_from, watch, data_check)
            summary = training.train()
    except torch.OutOfMemoryError:
        raise out_of_memory(config, training) from None
    except RuntimeError:
        if training is not None:
            watch.await_report()
        raise
    except Agreed:
        if training is None and resume_from is None and locks:
            folders.remove(run)  # nothing but its description is there yet
        raise
    summary["dtype"] = plan.dtype
    if rank == 0:
        write_results(run, summary, config.train.steps)
    for writer in training.writers:
        writer.close()
    leave(watch)
    return summary


def begin(
    config: Config, plan: Plan, datasets, resume_from: Path | None, watch: RankWatch, data_check: DataCheck
) -> Run:
    """The run before its first step: its model is built, there is room for it, and its metrics go where they should.

    Raises:
        Agreed: there is no room.
    """
    run, vocabulary = Path(config.train.out), plan.manifest["vocab_size"]
    build = functools.partial(build_engine, config, vocabulary, DTYPES[plan.dtype], datasets[0])
    engine, initial = build(resume_from)
    began, size = engine.steps_done, accounting.checkpoint_bytes(engine)
    memory.check_forms(engine)
    agreed(lambda: check_products(engine))
    on_first_rank(lambda: disk.check_space(run, size, config.train, began, config.switches))
    # None of them raises.
    writers = open_writers(config, run, began) if dist.get_rank() == 0 else []
    kernel_choices.share(run, resumed=resume_from is not None, hinted=True)
    tokens = plan.manifest["splits"]["train"]["tokens"]
    state = accounting.formula_rank_bytes(engine, adapters=False)
    logger.info("%s", console.start_table(config, vocabulary, dist.get_world_size(), tokens, state))
    return Run(engine, run, datasets, vocabulary, watch, writers, tokens, build, initial, data_check)


def check_products(engine: Engine) -> None:
    """
    Raises:
        ValueError: products of the sparse steps cannot run here, which is no news for the end of a dense start.
    """
    config = engine.run_config
    if not config.slope.packed or not engine.steps_done < config.slope.sparse_steps(config.train.steps).start:
        return
    for weight, own in weights_to_prune(engine.model, config.slope).items():
        rows, columns = partitions.shape_of(weight)
        mask = (torch.arange(columns, device=engine.device) % own.m < own.n).expand(rows, columns)
        values = torch.empty(rows, columns * own.n // own.m, dtype=engine.dtype, device=engine.device)
        check_weight(own.backend, values, pack_bits(mask), own.float8_kinds)


@contextlib.contextmanager
def in_order(watch: RankWatch) -> Iterator[None]:
    """What all ranks refuse alike ends the run in order: none takes another's end for a fault."""
    try:
        yield
    except (Agreed, sums.Damaged, metadata.Refused):
        leave(watch)
        raise


def out_of_memory(config: Config, training: Run | None) -> memory.OutOfMemory:
    """What a full device means for the user."""
    engine = getattr(training, "engine", None)
    where = f"in step {engine.steps_done + 1}" if engine else "building the model"
    reason = memory.explain(config, dist.get_rank(), where, memory.measure(torch.cuda.current_device()))
    return memory.OutOfMemory(f"{reason}. {recovery.what_is_safe(training.run)}" if training else reason)


def build_engine(config: Config, vocabulary: int, dtype: torch.dtype, train_set, resume_from: Path | None):
    """The engine at the step that the run begins or goes on with, in the form of the model that it trains there; and
    for the layers' figures what its weights began with.
    """
    # A run that is there already has no next step.
    first = max(0, min(store.step_of(resume_from), config.train.last_step - 1)) if resume_from else 0
    form = config.form_at(first)
    model = build_model(form, vocabulary, dtype)
    wants_layers = config.watch.layer_stats_interval > 0
    # Once packed weights have become dense ones, or the reverse, no weight is what the run began with.
    known = not (config.slope.packed and any(step <= first for step in config.switches))
    if config.train.init_from and known and (wants_layers or not resume_from):
        agreed(lambda: load_init(model, form, vocabulary, train_set))
    initial = (layer_stats.sample_all(model) if known else {}) if wants_layers else None
    engine = Engine(model, config, dtype, first)
    loaded = recovery.load(engine, resume_from) if resume_from else None
    if loaded != resume_from and config.form_at(engine.steps_done) != form:
        # Damaged after all, and the one before it goes on in the model's other form.
        remains = Remains(engine)
        del engine, model
        remains.alive()
        return build_engine(config, vocabulary, dtype, train_set, loaded)
    return engine, initial


def leave(watch: RankWatch) -> None:
    """All ranks end together: none takes another's end for a fault."""
    dist.barrier()
    watch.stop()
    parallel.finish()


def write_results(run: Path, summary: dict, steps: int) -> None:
    """summary.json, and DONE for whoever starts jobs; a disk that refuses them is in the summary."""
    try:
        whole.write_json(run / "summary.json", summary)
        if summary["steps"] == steps and summary["unsaved"] in (None, UNWANTED):
            whole.write_text(run / "DONE", f"{steps} steps\n")
    except OSError as error:
        if summary["unsaved"] in (None, UNWANTED):
            summary["unsaved"] = whole.reason(error)
