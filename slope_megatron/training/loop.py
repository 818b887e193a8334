"""The loop around the step: data, validation, metrics, checkpoints, and what is watched."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.data.batches import MicroBatches, ValidationBatches
from slope_megatron.data.prefetch import Prefetch
from slope_megatron.training import kernel_choices, summary
from slope_megatron.training.checkpoint import attempts, store
from slope_megatron.training.checkpoint.recovery import what_is_safe
from slope_megatron.training.checkpoint.saver import UNWANTED, Saver
from slope_megatron.training.data_check import DataCheck
from slope_megatron.training.engine import Engine, StepResult
from slope_megatron.training.teardown import Remains
from slope_megatron.training.telemetry import accounting, console, flops, memory
from slope_megatron.training.telemetry.layer_stats import LayerStats, Samples
from slope_megatron.training.telemetry.progress_bar import Progress
from slope_megatron.training.together import Agreed, on_first_rank
from slope_megatron.training.watch.bad_steps import Diverged, StepWatch
from slope_megatron.training.watch.rank_watch import RankWatch

logger = logging.getLogger(__name__)


class Run:
    """One run, from the step that its engine stands at to its last.

    Args:
        datasets: training and validation samples.
        vocabulary: entries of the tokenizer.
        writers: where metrics go; empty but on rank 0.
        build: the engine that goes on from a checkpoint, and what its layers' figures begin with; where a dense start
            or tail changes the model's form.
        initial: the same of the engine: the layers' figures are asked for if it is there.
        data_check: of the data that it trains on, if it goes on in the background.
        train_tokens: of the training split, which is one epoch.
    """

    def __init__(
        self,
        engine: Engine,
        run: Path,
        datasets,
        vocabulary: int,
        watch: RankWatch,
        writers: list,
        train_tokens: int,
        build: Callable[[Path], tuple[Engine, Samples | None]],
        initial: Samples | None = None,
        data_check: DataCheck | None = None,
    ):
        self.run, self.vocabulary, self.watch, self.train_tokens = run, vocabulary, watch, train_tokens
        self.first = dist.get_rank() == 0
        self.writers, self.build, self.data_check = writers, build, data_check
        self.adopt(engine, initial)
        config = self.config
        self.began = engine.steps_done
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        train_set, valid_set = datasets
        micro = config.data.micro_batch_size
        batches = MicroBatches(train_set, config.data.global_batch_size, micro, replica, replicas)
        self.batches = Prefetch(batches, config.train.last_step, pin=engine.device.type == "cuda")
        self.validation: ValidationBatches | None = None
        if valid_set is not None:
            self.validation = ValidationBatches(valid_set, config.train.eval_samples, micro, replica, replicas)
        self.steps = StepWatch(config.watch, config.data.global_batch_size)
        self.tokens = config.data.global_batch_size * config.data.seq_length
        self.peak = flops.peak_tflops(config)
        self.last_step = config.train.last_step
        self.attempt = attempts.begin(engine)
        self.val_loss: float | None = None
        self.stopped = False

    def adopt(self, engine: Engine, initial: Samples | None) -> None:
        """Train with this engine from here on."""
        self.engine, self.config = engine, engine.config
        self.saver = Saver(engine, self.run)
        self.layer_stats = LayerStats(engine, initial) if initial is not None else None
        # Before anybody who is told of the update: what the layers' figures are made of takes time.
        engine.observers.append(self.before_update)
        # Of this engine.
        self.step_seconds: list[float] = []

    def train(self) -> dict:
        """Train to the end.

        Returns:
            the run in figures.
        Raises:
            Diverged: too many bad steps in a row; what is on disk is of the last good one.
        """
        self.progress = Progress(self.run.name, self.last_step, self.engine.steps_done, visible=self.first)
        started = time.perf_counter()
        if self.last_step == self.engine.steps_done == 0:
            # Nothing is trained: what the run would begin with is validated and saved.
            self.validate(0)
            self.saver.save()
        try:
            while self.engine.steps_done < self.last_step and not self.stopped:
                if self.changes_form():
                    self.change_form()
                    continue
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
                    memory.warn_of_form(self.engine)
                held = memory.measure(self.engine.device) if joining else None
                if held:
                    logger.info("adapters have joined: %s at the highest so far", memory.gib(held.peak))
                self.progress.step(result.loss, self.tokens / result.seconds)
                self.after_step(self.engine.steps_done, result)
                self.watch.reach(self.engine.steps_done, "batch")
        except Diverged as error:
            self.saver.finish()
            raise Diverged(f"{error}. {what_is_safe(self.run)}") from None
        finally:
            self.progress.close()
            self.batches.close()
        self.saver.finish()
        self.await_data_check()
        if self.saver.failure == UNWANTED and self.engine.steps_done == self.config.train.steps:
            on_first_rank(lambda: store.remove_unwanted(self.run))
        return summary.of(self, time.perf_counter() - started)

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

    def changes_form(self) -> bool:
        """Whether the next step trains another form of the model: a dense start is over, or a dense tail begins."""
        run, done = self.engine.run_config, self.engine.steps_done
        return done in run.switches and run.form_at(done) != self.config

    def change_form(self) -> None:
        """Save, let the engine go, and go on with one of the other form; if nothing can be saved, the run ends.

        Raises:
            Agreed: what was saved cannot be read, and under `--auto-resume` an earlier checkpoint was. A disk that
                fails each time would have the steps between them trained for ever.
        """
        done = self.engine.steps_done
        self.watch.reach(done, "checkpoint")
        kernel_choices.save(self.run)
        if self.saver.save_at_once():
            logger.error("step %d is to be trained in the model's other form, from that checkpoint: the run ends", done)
            self.stopped = True
            return
        # As at the start: building takes its time, and so may the first step.
        self.watch.pause()
        kept = self.engine.attempts, self.engine.skipped_steps
        remains = Remains(self.engine)
        del self.engine, self.saver, self.layer_stats
        if alive := remains.alive():
            logger.warning("%s", alive)
        engine, initial = self.build(store.folder_of(self.run, done))
        if engine.steps_done != done:
            raise Agreed(
                f"step {done} is to be trained in the model's other form, and its checkpoint cannot be read: the run "
                f"ends. {what_is_safe(self.run)}"
            )
        # What the checkpoint holds of them is a copy, or nothing.
        engine.attempts, engine.skipped_steps = kept
        self.adopt(engine, initial)
        self.record(step=done, form=engine.form)

    def before_update(self, part: str) -> None:
        if part == "update" and self.layer_stats and self.layer_stats.due(self.engine.steps_done + 1):
            self.layer_stats.note_gradients()

    def after_step(self, done: int, result: StepResult) -> None:
        """Metrics; validation and checkpoints at their intervals and at the end; validation right before the adapters
        join or the form changes, too. Where it changes, `change_form` saves.
        """
        self.log_step(done, result)
        self.agree()
        last = done == self.last_step or self.stopped
        entered = done == self.config.adapter_start or (self.changes_form() and not last)
        if last or done % self.config.train.eval_interval == 0 or entered:
            self.watch.reach(done, "validation")
            self.validate(done)
        if self.engine.run_config.switches and (last or self.changes_form()):
            attempts.note_state(self.engine, self.attempt)
        interval = self.config.train.save_interval
        if interval and (last or (done % interval == 0 and not self.changes_form())):
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
        consumed = done * self.tokens
        values = dict(
            step=done,
            consumed_tokens=consumed,
            epoch=consumed / self.train_tokens,
            wall_seconds=attempts.wall_seconds(self.engine.attempts),
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
        self.record(**values)
        if not self.progress.drawn:
            logger.info("%s", console.step_line(values, self.last_step, self.engine.skipped_steps))

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
            logger.info("step %d: validation loss %.4f nats per token", done, self.val_loss)
        self.record(step=done, **found, double_pruning=accounting.double_pruning(self.engine))
