"""Run a test function on several ranks: processes of their own for each call, which meet at a store of this process.

Threads of process groups outlive the groups, thousands of them after some dozens of layouts, and slow a machine to a
crawl: so no process plays a rank twice.

    CPU    gloo
    CUDA   NCCL, a GPU a rank; with SLOPE_SHARE_GPUS=1 ranks share GPUs where there are too few, through sockets
"""

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import itertools
import os
import pickle
import signal
import sys
import traceback

from helpers.seeds import seed_everything
from helpers.servers import fork_server, gpu_context

# For an answer, and of a collective. GPUs are fast, and hours on them dear.
TIMEOUT_SECONDS = {"cpu": 600, "cuda": 180}
PR_SET_PDEATHSIG = 1
MEETINGS = itertools.count()


@functools.cache
def _served_store():
    """Whoever waits for a key hears of it at once: files are polled, twice for each of Megatron's many groups."""
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where the ranks of one call meet: the port of the store, and their own part of it."""

    port: int
    number: int

    def store(self):
        """For `init_process_group`, in a rank."""
        import torch.distributed as dist

        patience = datetime.timedelta(seconds=TIMEOUT_SECONDS["cpu"])
        store = dist.TCPStore("127.0.0.1", self.port, is_master=False, timeout=patience)
        return dist.PrefixStore(str(self.number), store)


def new_meeting() -> Meeting:
    return Meeting(_served_store().port, next(MEETINGS))


@dataclasses.dataclass(frozen=True)
class Place:
    """One rank of a call, and the groups that it forms with the others."""

    meeting: Meeting
    rank: int
    world: int
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    device: str


def _start_groups(place: Place) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from slope_megatron.training import parallel

    os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.rank), WORLD_SIZE=str(place.world))
    if place.device == "cuda":
        parallel.take_gpu()
    dist.init_process_group(
        "nccl" if place.device == "cuda" else "gloo",
        store=place.meeting.store(),
        rank=place.rank,
        world_size=place.world,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS[place.device]),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=place.tensor_parallel,
        pipeline_model_parallel_size=place.pipeline_parallel,
        context_parallel_size=place.context_parallel,
        create_gloo_process_groups=place.device == "cuda",
    )
    if place.device == "cpu":
        # All groups are gloo's: no second set of them.
        for name in [name for name in vars(parallel_state) if name.endswith("_GLOO")]:
            setattr(parallel_state, name, getattr(parallel_state, name.removesuffix("_GLOO")))
    seed_everything(1)
    # As `parallel.seed_step` does it: CUDA graphs take no other random states in.
    model_parallel_cuda_manual_seed(1, use_cudagraphable_rng=place.device == "cuda", force_reset_rng=True)


def _play_rank(pipe, function, arguments, place: Place) -> None:
    """One rank: answers ("ok", result) or ("error", traceback)."""
    # Nothing of a test run that was killed stays behind: ranks end with the server, the server with the tests.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _start_groups(place)
        answer = ("ok", function(*arguments))
        if place.device == "cuda":
            answer = to_cpu(answer)
    except BaseException:
        answer = ("error", traceback.format_exc())
    # Plain pickle: torch's own would leave tensors in shared memory that ends with this process.
    pipe.send_bytes(pickle.dumps(answer))
    # Groups are not taken down, which takes longer than most tests: no rank is gone before all have answered.
    with contextlib.suppress(EOFError):
        pipe.recv_bytes()
    sys.stdout.flush()
    os._exit(0)


def to_cpu(value):
    """What a rank answers, without a tensor that lives on its GPU."""
    import torch

    if torch.is_tensor(value):
        return value.cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return type(value)(map(to_cpu, value)) if type(value) in (list, tuple) else value


class RankPool:
    """Starts ranks. A failed call ends all of its processes: peers may hang in a collective.

    Args:
        device: "cpu", or "cuda": then a call that wants more ranks than there are GPUs skips its test, unless they are
            told to share (see above).
    """

    def __init__(self, device: str = "cpu"):
        self.device = device

    @functools.cached_property
    def context(self):
        """Made when a test is not skipped."""
        return gpu_context() if self.device == "cuda" else fork_server()

    def run(
        self,
        function,
        *arguments,
        world: int,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        context_parallel: int = 1,
    ) -> list:
        """What `function(*arguments)` returned on each of `world` ranks; `function` must be importable by name."""
        self.skip_if_too_few(world)
        meeting, ranks = new_meeting(), []
        for rank in range(world):
            ours, theirs = self.context.Pipe()
            place = Place(meeting, rank, world, tensor_parallel, pipeline_parallel, context_parallel, self.device)
            process = self.context.Process(target=_play_rank, args=(theirs, function, arguments, place))
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

    def skip_if_too_few(self, world: int) -> None:
        """Skip the test, with the reason, where NCCL would have to put two ranks on one GPU."""
        if self.device != "cuda":
            return
        import pytest
        import torch

        from slope_megatron.training.parallel import SHARE_GPUS

        found = torch.cuda.device_count()
        if found < world and not (found and os.environ.get(SHARE_GPUS) == "1"):
            pytest.skip(f"{world} ranks over NCCL need {world} GPUs, and this machine has {found}")

    def _answer(self, pipe, process):
        try:
            if pipe.poll(TIMEOUT_SECONDS[self.device]):
                return pickle.loads(pipe.recv_bytes())
            return "error", f"no answer in {TIMEOUT_SECONDS[self.device]} s"
        except EOFError:
            process.join()
            return "error", f"ended with exit code {process.exitcode} and no answer"
