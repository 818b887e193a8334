"""`slope pretrain`: the run from its first line to its summary."""

import logging
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.config import Config
from slope_megatron.data.batches import MicroBatches, ValidationBatches, build_datasets, load_manifest
from slope_megatron.models.dense import load_dense
from slope_megatron.models.dense_checkpoint import MegatronCheckpoint
from slope_megatron.models.provider import DTYPES, build_model
from slope_megatron.models.table import sparsity_table
from slope_megatron.ops.backend import choose
from slope_megatron.training import accounting, checkpoint, files, kernel_choices, parallel, run_folder, wanda
from slope_megatron.training.engine import Engine
from slope_megatron.training.faults import RankWatch
from slope_megatron.training.metrics import Metrics, Progress

logger = logging.getLogger(__name__)


def on_first_rank(function):
    """Call `function` on rank 0 only; its result, or its ValueError, reaches every rank."""
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise ValueError(outcome[1])
    return outcome[0]


def resolve_dtype(config: Config) -> str:
    """What `--dtype auto` means here: a resumed run's own type, else bf16 on GPUs and fp32 on CPUs."""
    if config.train.dtype != "auto":
        return config.train.dtype
    saved = run_folder.saved_dtype(Path(config.train.out)) if run_folder.is_resumed(config) else None
    return saved or ("bf16" if torch.cuda.is_available() else "fp32")


def pretrain(config: Config, origins: dict[str, str]) -> dict:
    """Train to `--steps` (or `--stop-at`); every rank calls it.

    Returns:
        the summary that is also written to RUN/summary.json.
    Raises:
        ValueError: bad input, the same sentence on every rank, before anything is written.
    """
    parallel.initialize(config)
    run = Path(config.train.out)
    manifest = on_first_rank(lambda: load_manifest(config.data.data))
    # Before anything is written or built: a split may be too short for the sequence length.
    datasets = build_datasets(
        config.data.data,
        seq_length=config.data.seq_length,
        train_samples=config.train.steps * config.data.global_batch_size,
        valid_samples=config.train.eval_samples,
        seed=config.train.seed,
        cache=config.data.cache,
    )
    dtype = on_first_rank(lambda: resolve_dtype(config))
    if config.train.init_from:
        on_first_rank(lambda: len(MegatronCheckpoint(config.train.init_from)))
        on_first_rank(lambda: run_folder.is_resumed(config) or wanda.check(config, len(datasets[0])))
    locks: list[run_folder.RunLock] = []  # held by rank 0 to the end of the run
    on_first_rank(lambda: locks.append(run_folder.open_run(config, origins, dtype)))
    resume_from = on_first_rank(lambda: find_checkpoint(config, run))
    on_first_rank(lambda: remove_old_announcements(run))
    watch = RankWatch(run, dist.get_rank(), dist.get_world_size(), lambda: what_is_safe(run))
    watch.start()
    logger.info("%s", sparsity_table(config))
    model = build_model(config, manifest["vocab_size"], DTYPES[dtype])
    if config.train.init_from and not resume_from:
        source, masks = MegatronCheckpoint(config.train.init_from), None
        if config.slope.packed and config.slope.pattern == "wanda":
            masks = wanda.calibrated_masks(config, manifest["vocab_size"], DTYPES[dtype], source, datasets[0])
        load_dense(model, config, source, config.slope.pattern, masks)
    engine = Engine(model, config, DTYPES[dtype])
    if resume_from:
        checkpoint.load(engine, resume_from)
    kernel_choices.share(run, resumed=resume_from is not None)
    summary = Run(engine, run, datasets, manifest["vocab_size"], watch).train()
    summary["dtype"] = dtype
    if dist.get_rank() == 0:
        files.write_json(run / "summary.json", summary)
        if summary["steps"] == config.train.steps:
            files.write_text(run / "DONE", f"{config.train.steps} steps\n")
    dist.barrier()
    watch.stop()
    parallel.finish()
    return summary


def find_checkpoint(config: Config, run: Path) -> Path | None:
    """The verified checkpoint to go on from; None: the run starts."""
    if not run_folder.is_resumed(config):
        return None
    folder = checkpoint.newest(run)
    checkpoint.read_state(folder, config)
    return folder


def remove_old_announcements(run: Path) -> None:
    for path in (run / "ranks").glob("*"):
        path.unlink()


def what_is_safe(run: Path) -> str:
    """For the message of a fault: what is kept, and how to go on."""
    complete = checkpoint.complete_checkpoints(run)
    if not complete:
        return "No checkpoint was written yet: start anew with --overwrite."
    return f"Checkpoint {complete[-1]} is complete: the same command with --resume goes on from it."


class Run:
    """The loop around the step: data, validation, metrics, checkpoints."""

    def __init__(self, engine: Engine, run: Path, datasets, vocabulary: int, watch: RankWatch):
        config = engine.config
        self.engine, self.config, self.run, self.vocabulary, self.watch = engine, config, run, vocabulary, watch
        self.first = dist.get_rank() == 0
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        train_set, valid_set = datasets
        micro = config.data.micro_batch_size
        self.batches = MicroBatches(train_set, config.data.global_batch_size, micro, replica, replicas)
        self.validation = ValidationBatches(valid_set, config.train.eval_samples, micro, replica, replicas)
        self.metrics = Metrics(run / "metrics.jsonl", engine.steps_done) if self.first else None
        stop_at = config.train.steps if config.train.stop_at is None else config.train.stop_at
        self.last_step = min(config.train.steps, stop_at)
        self.val_loss: float | None = None
        self.train_seconds = 0.0
        self.stopped = False
        self.steps_here = 0

    def train(self) -> dict:
        name = self.run.name
        progress = Progress(name, self.last_step, self.engine.steps_done, visible=self.first)
        tokens = self.config.data.global_batch_size * self.config.data.seq_length
        started = time.perf_counter()
        if self.last_step == self.engine.steps_done == 0:
            self.after_step(0)  # nothing is trained: what the run begins with is validated and saved
        while self.engine.steps_done < self.last_step and not self.stopped:
            result = self.engine.train_step(self.batches.step(self.engine.steps_done))
            done = self.engine.steps_done
            self.train_seconds += result.seconds
            self.steps_here += 1
            if self.steps_here == 1:
                kernel_choices.save(self.run)
            progress.step(result.loss, tokens / result.seconds)
            if self.first and (done % self.config.train.log_interval == 0 or done in (1, self.last_step)):
                self.metrics.write(
                    step=done,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    learning_rate=result.learning_rate,
                    tokens_per_second=tokens / result.seconds,
                    adapters=self.engine.phases.adapters_on(done - 1),
                )
            self.after_step(done)
        progress.close()
        return self.summary(tokens, time.perf_counter() - started)

    def after_step(self, done: int) -> None:
        """Validation and checkpoints at their intervals and at the end, and right before the adapters join."""
        self.stopped = self.agree_to_stop()
        last = done == self.last_step or self.stopped
        if last or done % self.config.train.eval_interval == 0 or done == self.config.adapter_start:
            self.validate(done)
        if last or done % self.config.train.save_interval == 0:
            checkpoint.save(self.engine, self.run)

    def agree_to_stop(self) -> bool:
        """Whether any rank was told to stop (USR1 or TERM): all of them then save after the same step."""
        told = torch.tensor([int(self.watch.stop_requested.is_set())], device=self.engine.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told)

    def validate(self, done: int) -> None:
        self.val_loss = self.engine.evaluate(self.validation)
        pruning = accounting.double_pruning(self.engine)
        if self.first:
            self.metrics.write(step=done, val_loss=self.val_loss, double_pruning=pruning)

    def unigram_entropy(self) -> float:
        """What knowing the frequencies of the validated tokens, and nothing else, would reach: nats per token."""
        counts = torch.zeros(self.vocabulary, dtype=torch.int64, device=self.engine.device)
        for batch in self.validation:
            counted = batch["labels"][batch["loss_mask"] > 0].to(counts.device)
            counts += torch.bincount(counted, minlength=self.vocabulary)
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        return entropy(counts)

    def summary(self, tokens: int, wall_seconds: float) -> dict:
        """The run in figures. A run that was already complete is validated once more."""
        if self.val_loss is None:
            self.validate(self.engine.steps_done)
        return {
            "steps": self.engine.steps_done,
            "stopped_early": self.stopped and self.engine.steps_done < self.config.train.steps,
            "tokens": self.engine.steps_done * tokens,
            "val_loss": self.val_loss,
            "unigram_entropy": self.unigram_entropy(),
            "parameters": accounting.parameter_count(self.engine),
            "tokens_per_second": self.steps_here * tokens / self.train_seconds if self.train_seconds else None,
            "train_seconds": self.train_seconds,
            "wall_seconds": wall_seconds,
            "state_bytes": accounting.state_bytes(self.engine),
            "double_pruning": accounting.double_pruning(self.engine),
            "ranks": dist.get_world_size(),
            "pipeline_parallel": self.config.parallel.pipeline_parallel,
            "tensor_parallel": self.config.parallel.tensor_parallel,
            "data_parallel": parallel_state.get_data_parallel_world_size(),
            "backend": choose(self.config.slope.backend) if self.config.slope.packed else "dense",
        }


def entropy(counts: torch.Tensor) -> float:
    """Entropy of a distribution given by counts, in nats."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log()).sum())
