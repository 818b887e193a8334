"""The loop around the step: data, validation, metrics, checkpoints, and what is watched."""

import logging
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.data.batches import MicroBatches, ValidationBatches
from slope_megatron.data.prefetch import Prefetch
from slope_megatron.ops.backend import choose
from slope_megatron.training import kernel_choices
from slope_megatron.training.checkpoint import attempts, store
from slope_megatron.training.checkpoint.saver import Saver
from slope_megatron.training.data_check import DataCheck
from slope_megatron.training.engine import Engine, StepResult
from slope_megatron.training.telemetry import accounting, flops, memory
from slope_megatron.training.telemetry.layer_stats import LayerStats
from slope_megatron.training.telemetry.progress_bar import Progress
from slope_megatron.training.watch.bad_steps import Diverged, StepWatch
from slope_megatron.training.watch.rank_watch import RankWatch

logger = logging.getLogger(__name__)


class Run:
    """One run, from the step that its engine stands at to its last.

    Args:
        datasets: training and validation samples.
        vocabulary: entries of the tokenizer.
        writers: where metrics go; empty but on rank 0.
        layer_stats: figures of each layer, if asked for.
        data_check: of the data that it trains on, if it goes on in the background.
    """

    def __init__(
        self,
        engine: Engine,
        run: Path,
        datasets,
        vocabulary: int,
        watch: RankWatch,
        writers: list,
        layer_stats: LayerStats | None = None,
        data_check: DataCheck | None = None,
    ):
        config = engine.config
        self.engine, self.config, self.run, self.vocabulary, self.watch = engine, config, run, vocabulary, watch
        self.first = dist.get_rank() == 0
        self.writers, self.layer_stats, self.data_check = writers, layer_stats, data_check
        self.began = engine.steps_done
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        train_set, valid_set = datasets
        micro = config.data.micro_batch_size
        batches = MicroBatches(train_set, config.data.global_batch_size, micro, replica, replicas)
        self.batches = Prefetch(batches, config.train.last_step, pin=engine.device.type == "cuda")
        self.validation: ValidationBatches | None = None
        if valid_set is not None:
            self.validation = ValidationBatches(valid_set, config.train.eval_samples, micro, replica, replicas)
        self.saver = Saver(engine, run)
        self.steps = StepWatch(config.watch, config.data.global_batch_size)
        # Before anybody who is told of the update: what the layers' figures are made of takes time.
        engine.observers.append(self.before_update)
        self.tokens = config.data.global_batch_size * config.data.seq_length
        self.peak = flops.peak_tflops(config)
        self.last_step = config.train.last_step
        self.attempt = attempts.begin(engine)
        self.val_loss: float | None = None
        self.step_seconds: list[float] = []
        self.stopped = False

    def train(self) -> dict:
        """Train to the end.

        Returns:
            the run in figures.
        Raises:
            Diverged: too many bad steps in a row; what is on disk is of the last good one.
        """
        progress = Progress(self.run.name, self.last_step, self.engine.steps_done, visible=self.first)
        started = time.perf_counter()
        if self.last_step == self.engine.steps_done == 0:
            # Nothing is trained: what the run would begin with is validated and saved.
            self.validate(0)
            self.saver.save()
        try:
            while self.engine.steps_done < self.last_step and not self.stopped:
                joining = self.engine.phases.adapters_join(self.engine.steps_done)
                if joining:
                    self.before_adapters()
                result = self.engine.train_step(self.batches.step(self.engine.steps_done))
                self.step_seconds.append(result.seconds)
                attempts.note_step(self.engine, self.attempt, result.seconds, time.perf_counter() - started)
                if len(self.step_seconds) == 1:
                    kernel_choices.save(self.run)
                    # The first step may compile and search kernels, each rank its own: watched from here on.
                    self.engine.observers.append(lambda part: self.watch.reach(self.engine.steps_done, part))
                held = memory.measure(self.engine.device) if joining else None
                if held:
                    logger.info("adapters have joined: %s at the highest so far", memory.gib(held.peak))
                progress.step(result.loss, self.tokens / result.seconds)
                self.after_step(self.engine.steps_done, result)
                self.watch.reach(self.engine.steps_done, "batch")
        except Diverged as error:
            self.saver.finish()
            raise Diverged(f"{error}. {what_is_safe(self.run)}") from None
        finally:
            progress.close()
            self.batches.close()
        self.saver.finish()
        self.await_data_check()
        return self.summary(time.perf_counter() - started)

    def before_adapters(self) -> None:
        """Say what memory there is and what the adapters need; if that is too little, save first, and try."""
        if self.engine.graphs:
            # Captured without them; the memory is wanted.
            self.engine.graphs.drop()
        need = memory.adapters_need(self.engine)
        held = memory.measure(self.engine.device)
        said, fits = memory.adapters_report(need, held)
        logger.log(logging.INFO if fits else logging.WARNING, "%s", said)
        tight = torch.tensor(int(not fits), device=self.engine.device)
        dist.all_reduce(tight, op=dist.ReduceOp.MAX)
        if tight and self.engine.steps_done:
            self.saver.save()
            self.saver.finish()
        self.record(step=self.engine.steps_done, adapters_need=need, **({"peak_bytes": held.peak} if held else {}))

    def before_update(self, part: str) -> None:
        if part == "update" and self.layer_stats and self.layer_stats.due(self.engine.steps_done + 1):
            self.layer_stats.note_gradients()

    def after_step(self, done: int, result: StepResult) -> None:
        """Metrics; validation and checkpoints at their intervals and at the end, and right before the adapters join."""
        self.log_step(done, result)
        self.agree()
        last = done == self.last_step or self.stopped
        if last or done % self.config.train.eval_interval == 0 or done == self.config.adapter_start:
            self.watch.reach(done, "validation")
            self.validate(done)
        interval = self.config.train.save_interval
        if interval and (last or done % interval == 0):
            self.watch.reach(done, "checkpoint")
            # A resumed run must find every choice made by now.
            kernel_choices.save(self.run)
            self.saver.save()

    def log_step(self, done: int, result: StepResult) -> None:
        """One line at the interval; bad steps, spikes and figures of layers have theirs whenever they come."""
        news = {}
        try:
            news = self.steps.look(result, done)
            self.attempt["bad_steps"] = self.steps.bad_steps
        except Diverged:
            self.write(done, result, {"bad": True})
            raise
        if self.layer_stats and self.layer_stats.due(done):
            news = {**news, "layers": self.layer_stats.collect()}
        if news or done % self.config.train.log_interval == 0 or done in (1, self.last_step):
            self.write(done, result, news)

    def write(self, done: int, result: StepResult, news: dict) -> None:
        tokens_per_second = self.tokens / result.seconds
        adapters = self.engine.phases.adapters_on(done - 1)
        counts = flops.flops_per_token(self.config, self.vocabulary, adapters=adapters)
        held = memory.measure(self.engine.device)
        self.record(
            step=done,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens_per_second=tokens_per_second,
            adapters=adapters,
            **({"loss_scale": result.loss_scale} if self.engine.dtype == torch.float16 else {}),
            **flops.speed(counts, tokens_per_second, dist.get_world_size(), self.peak),
            **({"peak_memory_gib": round(held.peak / memory.GIB, 3)} if held else {}),
            **news,
        )

    def record(self, **values) -> None:
        for writer in self.writers:
            writer.write(values)

    def agree(self) -> None:
        """Whether any rank was told to stop (USR1 or TERM): all then save after the same step. Whether every rank has
        written its part of a checkpoint: all then publish it. And whether the data has been found damaged.

        Raises:
            DamagedData: it has; nothing more is saved.
        """
        damaged = self.data_check is not None and self.data_check.problem is not None
        stop, busy, bad_data = self.any_rank(self.watch.stop_requested.is_set(), self.saver.busy(), damaged)
        if self.data_check is not None and bad_data:
            saved = [folder for folder in store.entries(self.run) if store.step_of(folder) > self.began]
            self.data_check.stop(self.began, self.engine.steps_done, [folder.name for folder in saved])
        self.stopped = stop
        if self.saver.pending and not busy:
            self.saver.finish()

    def any_rank(self, *facts: bool) -> list[bool]:
        """Whether each is so on any rank; collective."""
        if dist.get_world_size() == 1:
            return list(facts)  # without waiting for the device, which still updates
        told = torch.tensor([int(fact) for fact in facts], device=self.engine.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return [bool(fact) for fact in told.tolist()]

    def await_data_check(self) -> None:
        """A run that ends before its data was read to the end waits for that, unless it was told to stop."""
        if self.data_check is None or self.stopped:
            return
        while self.any_rank(self.data_check.busy())[0]:
            self.watch.reach(self.engine.steps_done, "checkpoint")
            time.sleep(0.1)
        self.agree()

    def validate(self, done: int) -> None:
        found: dict[str, float] = {}
        if self.validation is not None:
            self.val_loss = found["val_loss"] = self.engine.evaluate(self.validation)
        self.record(step=done, **found, double_pruning=accounting.double_pruning(self.engine))

    def speed(self) -> dict[str, float] | None:
        """Of the median step here, which neither compiling nor searching kernels distorts; MFU where the peak is known.

        Operations are counted without adapters, which few steps have.
        """
        if not self.step_seconds:
            return None
        tokens_per_second = self.tokens / statistics.median(self.step_seconds)
        counts = flops.flops_per_token(self.config, self.vocabulary)
        found = flops.speed(counts, tokens_per_second, dist.get_world_size(), self.peak)
        return {"tokens_per_second": tokens_per_second, **found}

    def unigram_entropy(self) -> float | None:
        """What knowing the frequencies of the validated tokens, and nothing else, would reach: nats per token."""
        if self.validation is None:
            return None
        counts = torch.zeros(self.vocabulary, dtype=torch.int64, device=self.engine.device)
        for batch in self.validation:
            counted = batch["labels"][batch["loss_mask"] > 0].to(counts.device)
            counts += torch.bincount(counted, minlength=self.vocabulary)
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        return entropy(counts)

    def summary(self, wall_seconds: float) -> dict:
        """The run in figures; seconds, tokens/s and counts of steps are those of all its attempts."""
        if self.val_loss is None and self.validation is not None:
            self.validate(self.engine.steps_done)
        self.attempt["wall_seconds"] = wall_seconds
        return {
            "steps": self.engine.steps_done,
            "stopped_early": self.stopped and self.engine.steps_done < self.config.train.steps,
            "unsaved": self.saver.failure,
            "tokens": self.engine.steps_done * self.tokens,
            "val_loss": self.val_loss,
            "unigram_entropy": self.unigram_entropy(),
            "parameters": accounting.parameter_count(self.engine),
            "speed": self.speed(),
            "device": accounting.device_name(self.engine),
            "peak_memory_bytes": accounting.peak_memory_bytes(self.engine),
            **attempts.totals(self.engine.attempts, self.tokens),
            "state_bytes": accounting.state_bytes(self.engine),
            "state_bytes_per_rank": accounting.state_bytes_per_rank(self.engine),
            "zero_stage": self.config.parallel.zero_stage,
            "double_pruning": accounting.double_pruning(self.engine),
            "ranks": dist.get_world_size(),
            "pipeline_parallel": self.config.parallel.pipeline_parallel,
            "tensor_parallel": self.config.parallel.tensor_parallel,
            "data_parallel": parallel_state.get_data_parallel_world_size(),
            "backend": choose(self.config.slope.backend) if self.config.slope.packed else "dense",
        }


def what_is_safe(run: Path) -> str:
    """For the message of a fault: what is kept, and how to go on."""
    newest = store.newest_known(run)
    if newest is None:
        return "No checkpoint was written yet: start anew with --overwrite."
    return f"Checkpoint {newest} is complete: the same command with --resume goes on from it."


def entropy(counts: torch.Tensor) -> float:
    """Entropy of a distribution given by counts, in nats."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log()).sum())
