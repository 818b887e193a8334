"""Training steps of whole engines on several ranks, dense and 2:4 in turn: what each rank does for bench_parallel.

Every kind of engine (dense; 2:4 in each mode) is built beside the others from one description, so that rounds can
alternate between them; memory is what an engine adds to the ones before it. Rank 0 says on stderr what begins, and
leaves the rows in a file anew after every round.
"""

import contextlib
import dataclasses
import gc
import os
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.bench.collectives import Counted
from slope_megatron.bench.engines import GIB, BuiltEngine, allocated, peak_allocated, planned_bytes, reset_peak
from slope_megatron.bench.progress import Clock
from slope_megatron.bench.work import ROWS, Work
from slope_megatron.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    SlopeConfig,
    TrainConfig,
)
from slope_megatron.integrations import cpu_host
from slope_megatron.layers import communication
from slope_megatron.planner.traffic import data_parallel_bytes
from slope_megatron.storage.whole import write_json
from slope_megatron.training import kernel_choices, parallel

DENSE = "dense"
WARM_UP_STEPS = 2
# Before a budget of seconds may end the rounds, and before there are rows.
FEWEST_ROUNDS = 3


def config_of(mode: str, work: Work, replicas: int) -> Config:
    """A few blocks of a model at its width; unlike in training, the first linear is sparse too: it is one of few."""
    micro_batch = work.tokens // work.sequence
    slope = {"enabled": False} if mode == DENSE else {"mode": mode}
    tensor = work.tensor_parallel
    return Config(
        slope=SlopeConfig(dense_first_linear=False, **slope),
        model=dataclasses.replace(
            work.model.architecture, num_layers=work.blocks, vocab_size=work.vocabulary, max_positions=None
        ),
        parallel=ParallelConfig(
            tensor_parallel=tensor, sequence_parallel=tensor > 1, grad_reduce_dtype=work.grad_reduce_dtype
        ),
        data=DataConfig(
            data="none",
            seq_length=work.sequence,
            micro_batch_size=micro_batch,
            global_batch_size=micro_batch * work.micro_batches * replicas,
        ),
        optimizer=OptimizerConfig(lr=1e-5, min_lr=1e-6),
        train=TrainConfig(out="none", steps=1000),
    )


class Bench:
    """One engine, its batches, and what it takes."""

    def __init__(self, mode: str, work: Work, replicas: int, clock: Clock):
        before = allocated()
        self.mode, self.work = mode, work
        clock.say(f"{mode}: engine of {work.blocks} blocks")
        self.built = BuiltEngine(config_of(mode, work, replicas), torch.bfloat16)
        self.engine = self.built.engine
        # The same in every step: fetching them is not what is timed.
        self.batches = list(self.built.batches.step(0))
        self.marks: list[tuple[str, float]] = []
        self.engine.observers.append(self.mark)
        clock.say(f"{mode}: first step, in which kernels are compiled and chosen")
        self.step()
        clock.say(f"{mode}: {WARM_UP_STEPS + 1} more steps: to warm up, for memory, for bytes sent")
        for _ in range(WARM_UP_STEPS - 1):
            self.step()
        self.state_bytes = allocated() - before
        reset_peak()
        self.step()
        self.peak_bytes = peak_allocated() - before
        with Counted(groups()) as counted:
            self.step()
        self.counted = counted

    def mark(self, part: str) -> None:
        torch.cuda.synchronize()
        self.marks.append((part, time.perf_counter()))

    def step(self) -> dict[str, float]:
        """One step; milliseconds by part, of the slowest rank."""
        torch.cuda.synchronize()
        dist.barrier()
        self.marks = []
        started = time.perf_counter()
        self.engine.train_step(self.batches)
        self.mark("end")
        times = {part: moment for part, moment in self.marks}
        taken = torch.tensor(
            [
                times["end"] - started,
                times["gradients"] - started,
                times["update"] - times["gradients"],
                times["end"] - times["update"],
            ],
            dtype=torch.float64,
            device=self.engine.device,
        )
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return dict(zip(("step", "forward_backward", "reduce", "update"), (1e3 * taken).tolist(), strict=True))


def groups() -> dict[str, dist.ProcessGroup]:
    """The groups whose bytes are told apart; on one rank both are that rank."""
    return {
        "data": parallel_state.get_data_parallel_group(),
        "tensor": parallel_state.get_tensor_model_parallel_group(),
    }


@contextlib.contextmanager
def waiting():
    """Each collective of a 2:4 linear is waited for where it starts: nothing overlaps."""

    class Waited(communication.InFlight):
        def __init__(self, work, tensor):
            super().__init__(work, tensor)
            self.wait()

    with mock.patch.object(communication, "InFlight", Waited):
        yield


# -- formulas ----------------------------------------------------------------------------------------------------------


def sent_by_formula(bench: Bench, tensor: int, replicas: int) -> dict[str, float]:
    """Bytes that a rank sends in a step, up to what is small (norms' gradients, losses).

    S = tokens x hidden x 2 bytes, M micro-batches, B blocks; P parameters of this rank.

    tensor    (r - 1) / r S M (10 B + 6)     sequence parallel: a block's forward gathers twice and scatters twice;
                                             backward gathers four times (twice the input again) and scatters twice;
                                             the embedding is all-reduced and gathered (Megatron scatters none that has
                                             positions), the output layer gathers twice and scatters once
    data      as `slope_megatron.planner.traffic` has it for ZeRO-1
    """
    work, sizes = bench.work, {"tensor": 0.0, "data": 0.0}
    if tensor > 1:
        whole = work.tokens * work.model.hidden * 2
        sizes["tensor"] = (tensor - 1) / tensor * whole * work.micro_batches * (10 * work.blocks + 6)
    if replicas > 1:
        held = sum(parameter.numel() for group in bench.engine.members.values() for parameter in group)
        sent = data_parallel_bytes(held, replicas, 1, work.micro_batches, "bf16", work.grad_reduce_dtype)
        sizes["data"] = sum(sent.values())
    return sizes


# -- a rank ------------------------------------------------------------------------------------------------------------


def measure(work: Work, keep=lambda rows: None) -> list[dict]:
    """A row for each engine; the same on every rank.

    Args:
        keep: called with the rows after each round, from the first few rounds on.
    """
    clock = work.clock(speaks=dist.get_rank() == 0)
    replicas, tensor = parallel_state.get_data_parallel_world_size(), work.tensor_parallel
    benches: dict[str, Bench] = {}
    for index, mode in enumerate(work.modes):
        if benches and over(clock):
            clock.say(f"--seconds are over: not measured: {', '.join(work.modes[index:])}")
            break
        benches[mode] = Bench(mode, work, replicas, clock)
    variants = {(mode, True): bench for mode, bench in benches.items()}
    if work.waiting and tensor > 1:
        variants |= {(mode, False): bench for mode, bench in benches.items() if mode != DENSE}
    samples: dict = {variant: [] for variant in variants}
    fewest = min(FEWEST_ROUNDS, work.rounds)
    rows: list[dict] = []
    for number in range(work.rounds):
        if number >= fewest and over(clock):
            clock.say(f"--seconds are over: {number} rounds of {work.rounds}")
            break
        clock.say(f"round {number + 1} of {work.rounds}: {len(variants)} engines in turn")
        for (mode, overlaps), bench in variants.items():
            with contextlib.nullcontext() if overlaps else waiting():
                samples[mode, overlaps].append(bench.step())
        if number + 1 >= fewest:
            rows = [row_of(bench, overlaps, samples[mode, overlaps]) for (mode, overlaps), bench in variants.items()]
            keep(rows)
    return rows


def over(clock: Clock) -> bool:
    """Whether the budget is spent, by the clock of the rank that is ahead: the same answer on every rank."""
    spent = torch.tensor(float(clock.over()), device=torch.device(torch.cuda.current_device()))
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return bool(spent)


def row_of(bench: Bench, overlaps: bool, samples: list[dict[str, float]]) -> dict:
    work, sent = bench.work, bench.counted
    replicas, tensor = parallel_state.get_data_parallel_world_size(), work.tensor_parallel
    formula = sent_by_formula(bench, tensor, replicas)
    return {
        "model": work.model.name,
        "mode": bench.mode,
        "overlap": overlaps,
        "tensor_parallel": tensor,
        "data_parallel": replicas,
        "grad_reduce_dtype": work.grad_reduce_dtype,
        "blocks": work.blocks,
        "micro_batches": work.micro_batches,
        "tokens": work.tokens,
        "samples": list(samples),
        "state_gib": bench.state_bytes / GIB,
        "peak_gib": bench.peak_bytes / GIB,
        "planned_gib": planned_bytes(bench.engine.config, replicas) / GIB,
        "tensor_sent_gib": sent.total("tensor") / GIB,
        "tensor_formula_gib": formula["tensor"] / GIB,
        "data_sent_gib": sent.total("data") / GIB,
        "data_formula_gib": formula["data"] / GIB,
    }


def play(work: Work) -> None:
    """One rank of a start; torch.distributed's variables say which. Rank 0 leaves ROWS in the folder."""
    first = os.environ["RANK"] == "0"
    clock = work.clock(speaks=first)
    clock.say("frameworks are imported; the ranks meet")
    cpu_host.prepare()
    if first:
        clock.show_log()
    parallel.initialize(config_of(DENSE, work, 1))
    kernel_choices.share(Path(work.folder), resumed=True)
    # DeepSpeed collects garbage eight times an engine: 2 s if all modules are looked through.
    gc.freeze()
    measure(work, keep=lambda rows: write_json(Path(work.folder, ROWS), rows) if first else None)
    kernel_choices.save(Path(work.folder))
    parallel.finish()
