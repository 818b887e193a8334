"""Run a test function on several ranks: processes that stay alive between tests, gloo, a file rendezvous each time."""

import contextlib
import itertools
import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

TIMEOUT_SECONDS = 900


def _start_groups(rendezvous: str, rank: int, world: int, tensor_parallel: int, pipeline_parallel: int) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel, pipeline_model_parallel_size=pipeline_parallel
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def _stop_groups() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _worker(pipe) -> None:
    """One rank: takes (function, arguments, layout), answers ("ok", result) or ("error", traceback)."""
    import torch

    from slope_megatron.training import cpu_host

    torch.set_num_threads(1)
    cpu_host.prepare()
    while (job := pipe.recv()) is not None:
        function, arguments, rendezvous, rank, world, *sizes = job
        try:
            _start_groups(rendezvous, rank, world, *sizes)
            answer = ("ok", function(*arguments))
            _stop_groups()
        except BaseException:
            answer = ("error", traceback.format_exc())
        pipe.send(answer)


class RankPool:
    """Processes that play ranks. A failed call ends them all: peers may hang in a collective."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.numbers = itertools.count()
        self.workers: list = []

    def _grow(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self.workers) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def run(self, function, *arguments, world: int, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> list:
        """What `function(*arguments)` returned on each of `world` ranks; `function` must be importable by name."""
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        self._grow(world)
        rendezvous = Path(self.folder.name) / f"rendezvous{next(self.numbers)}"
        ranks = self.workers[:world]
        for rank, (_, pipe) in enumerate(ranks):
            pipe.send((function, arguments, str(rendezvous), rank, world, tensor_parallel, pipeline_parallel))
        results = []
        for rank, (_, pipe) in enumerate(ranks):
            kind, value = self._answer(pipe, rank)
            if kind == "error":
                self.close(patience=0.0)
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results.append(value)
        return results

    def _answer(self, pipe, rank: int):
        try:
            if pipe.poll(TIMEOUT_SECONDS):
                return pipe.recv()
            problem = f"gave no answer in {TIMEOUT_SECONDS} s"
        except EOFError:
            problem = "ended without an answer"
        return "error", f"rank {rank} {problem}"

    def close(self, patience: float = 20.0) -> None:
        """End all processes, by force after `patience` seconds; a later `run` starts new ones."""
        for _, pipe in self.workers:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process, pipe in self.workers:
            process.join(patience)
            process.kill()
            process.join()
            pipe.close()
        self.workers = []
