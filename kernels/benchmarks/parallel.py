"""Training steps of whole engines on several ranks, dense and 2:4 in turn: what each rank does for bench_parallel.

Every kind of engine (dense; 2:4 in each mode) is built beside the others from one description, so that rounds can
alternate between them; memory is what an engine adds to the ones before it.
"""

import contextlib
import dataclasses
import io
import json
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from collectives import Counted
from megatron.core import parallel_state
from models import Model

from slope_megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SlopeConfig,
    TrainConfig,
)
from slope_megatron.launch.layout import Layout
from slope_megatron.launch.memory import Holding, fullest_gpu, precision
from slope_megatron.launch.traffic import data_parallel_bytes
from slope_megatron.layers import communication
from slope_megatron.models.provider import build_model
from slope_megatron.training import cpu_host, kernel_choices, parallel
from slope_megatron.training.engine import Engine

GIB = 2**30
DENSE = "dense"
WARM_UP_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Work:
    """What the ranks of one start are to measure.

    Args:
        model: one a start, because DeepSpeed's engines stay in memory.
        modes: "dense", and modes of SlopeConfig.
        waiting: whether the 2:4 engines are timed once more with each collective waited for where it starts.
        tokens, sequence: of a micro-batch, and of one sample.
        folder: for kernel choices and results.
        grad_reduce_dtype: as `slope pretrain` has it.
    """

    model: Model
    modes: tuple[str, ...]
    tensor_parallel: int
    blocks: int
    tokens: int
    sequence: int
    micro_batches: int
    vocabulary: int
    rounds: int
    waiting: bool
    folder: str
    grad_reduce_dtype: str = "auto"


def config_of(mode: str, work: Work, replicas: int) -> Config:
    """A few blocks of a model at its width; unlike in training, the first linear is sparse too: it is one of few."""
    model, micro_batch = work.model, work.tokens // work.sequence
    slope = {"enabled": False} if mode == DENSE else {"mode": mode}
    tensor = work.tensor_parallel
    return Config(
        slope=SlopeConfig(dense_first_linear=False, **slope),
        model=ModelConfig(
            num_layers=work.blocks,
            hidden_size=model.hidden,
            ffn_hidden_size=model.ffn,
            num_attention_heads=model.heads,
            vocab_size=work.vocabulary,
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

    def __init__(self, mode: str, work: Work, replicas: int):
        before = allocated()
        self.mode, self.work = mode, work
        self.config = config_of(mode, work, replicas)
        dtype = torch.bfloat16
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory
            self.engine = Engine(build_model(self.config, work.vocabulary, dtype), self.config, dtype)
        self.batches = [self.batch(index) for index in range(work.micro_batches)]
        self.marks: list[tuple[str, float]] = []
        self.engine.on_part = self.mark
        for _ in range(WARM_UP_STEPS):
            self.step()
        self.state_bytes = allocated() - before
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.step()
        self.peak_bytes = peak_allocated() - before
        with Counted(groups()) as counted:
            self.step()
        self.counted = counted

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Random tokens, others on each replica; the ranks of one replica must see the same."""
        replica = parallel_state.get_data_parallel_rank()
        generator = torch.Generator().manual_seed(1000 * replica + index)
        shape = (self.work.tokens // self.work.sequence, self.work.sequence)
        tokens = torch.randint(self.work.vocabulary, shape, generator=generator)
        positions = torch.arange(self.work.sequence).expand(shape)
        return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(shape), "position_ids": positions}

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


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_allocated() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


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
    data      as `slope_megatron.launch.traffic` has it for ZeRO-1
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


def planned_bytes(bench: Bench, tensor: int, replicas: int) -> float:
    """What `slope plan` counts at the peak, without what it assumes for CUDA's context and fragmentation."""
    layout = Layout(tensor, 1, replicas, sequence_parallel=tensor > 1)
    how = Holding(precision("bf16", "fp32"), "kernels", fused=True)
    sizes = fullest_gpu(bench.config, layout, bench.work.vocabulary, how)
    return sum(size for name, size in sizes.items() if name not in ("context", "fragmentation"))


# -- a rank ------------------------------------------------------------------------------------------------------------


def measure(work: Work) -> list[dict]:
    """A row for each engine; the same on every rank."""
    replicas, tensor = parallel_state.get_data_parallel_world_size(), work.tensor_parallel
    benches = {mode: Bench(mode, work, replicas) for mode in work.modes}
    variants = {(mode, True): bench for mode, bench in benches.items()}
    if work.waiting and tensor > 1:
        variants |= {(mode, False): bench for mode, bench in benches.items() if mode != DENSE}
    samples: dict = {variant: [] for variant in variants}
    for _ in range(work.rounds):
        for (mode, overlaps), bench in variants.items():
            with contextlib.nullcontext() if overlaps else waiting():
                samples[mode, overlaps].append(bench.step())
    rows = []
    for (mode, overlaps), bench in variants.items():
        sent, formula = bench.counted, sent_by_formula(bench, tensor, replicas)
        rows.append(
            {
                "model": work.model.name,
                "mode": mode,
                "overlap": overlaps,
                "tensor_parallel": tensor,
                "data_parallel": replicas,
                "grad_reduce_dtype": work.grad_reduce_dtype,
                "blocks": work.blocks,
                "micro_batches": work.micro_batches,
                "tokens": work.tokens,
                "samples": samples[mode, overlaps],
                "state_gib": bench.state_bytes / GIB,
                "peak_gib": bench.peak_bytes / GIB,
                "planned_gib": planned_bytes(bench, tensor, replicas) / GIB,
                "tensor_sent_gib": sent.total("tensor") / GIB,
                "tensor_formula_gib": formula["tensor"] / GIB,
                "data_sent_gib": sent.total("data") / GIB,
                "data_formula_gib": formula["data"] / GIB,
            }
        )
    return rows


def play(work: Work) -> None:
    """One rank of a start; torch.distributed's variables say which. Rank 0 leaves rows.json in the folder."""
    cpu_host.prepare()
    parallel.initialize(config_of(DENSE, work, 1))
    kernel_choices.share(Path(work.folder), resumed=True)
    rows = measure(work)
    if dist.get_rank() == 0:
        Path(work.folder, "rows.json").write_text(json.dumps(rows))
    kernel_choices.save(Path(work.folder))
    parallel.finish()
