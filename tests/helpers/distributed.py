"""Run a test function on several ranks: processes forked for each call, gloo, a file rendezvous each time.

Threads of process groups outlive the groups, thousands of them after some dozens of layouts, and slow a machine to a
crawl: so no process plays a rank twice. They are forked from one server that has imported the frameworks.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from pathlib import Path

TIMEOUT_SECONDS = 600
PR_SET_PDEATHSIG = 1


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


def _play_rank(pipe, function, arguments, layout) -> None:
    """One rank: answers ("ok", result) or ("error", traceback)."""
    # Nothing of a test run that was killed stays behind: ranks end with the server, the server with the tests.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _start_groups(*layout)
        answer = ("ok", function(*arguments))
    except BaseException:
        answer = ("error", traceback.format_exc())
    # Plain pickle: torch's own would leave tensors in shared memory that ends with this process.
    pipe.send_bytes(pickle.dumps(answer))
    # Groups are not taken down, which takes longer than most tests: no rank is gone before all have answered.
    with contextlib.suppress(EOFError):
        pipe.recv_bytes()
    sys.stdout.flush()
    os._exit(0)


def fork_server():
    """A multiprocessing context whose processes are forked from one that has imported the frameworks."""
    context = multiprocessing.get_context("forkserver")
    # The server sees the environment, not this process's import path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    context.set_forkserver_preload(["helpers.imported"])
    return context


class RankPool:
    """Starts ranks. A failed call ends all of its processes: peers may hang in a collective."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.numbers = itertools.count()
        self.context = fork_server()

    def run(self, function, *arguments, world: int, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> list:
        """What `function(*arguments)` returned on each of `world` ranks; `function` must be importable by name."""
        rendezvous = str(Path(self.folder.name) / f"rendezvous{next(self.numbers)}")
        ranks = []
        for rank in range(world):
            ours, theirs = self.context.Pipe()
            layout = (rendezvous, rank, world, tensor_parallel, pipeline_parallel)
            process = self.context.Process(target=_play_rank, args=(theirs, function, arguments, layout))
            process.start()
            theirs.close()
            ranks.append((process, ours))
        results = []
        try:
            for rank, (process, pipe) in enumerate(ranks):
                kind, value = self._answer(pipe, process)
                assert kind == "ok", f"rank {rank} failed:\n{value}"
                results.append(value)
        finally:
            for process, pipe in ranks:
                if len(results) < world:
                    process.kill()
                pipe.close()
            for process, _ in ranks:
                process.join()
        return results

    @staticmethod
    def _answer(pipe, process):
        try:
            if pipe.poll(TIMEOUT_SECONDS):
                return pickle.loads(pipe.recv_bytes())
            return "error", f"no answer in {TIMEOUT_SECONDS} s"
        except EOFError:
            process.join()
            return "error", f"ended with exit code {process.exitcode} and no answer"
