"""Before the first collective: have all ranks come? A wait says for whom; a GPU that two ranks took is refused.

torch's own rendezvous waits for half an hour and names nobody: rank 0 opens the store, and cannot look into it before
all have come. So the store is opened here, without that wait. All ranks leave a word in it, rank 0, which reads them,
tells all how it went, and torch meets at the same store.
"""

import contextlib
import datetime
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from slope_megatron.training.watch.process import kernel

logger = logging.getLogger(__name__)
# Nobody is missed for so long, and is named again after so long.
QUIET_SECONDS, REPEAT_SECONDS = 20.0, 60.0
POLL_SECONDS = 0.1
# Rank 0's store is gone with its process: before it ends, those that have come hear why.
FAREWELL_SECONDS = 10.0
MOST_NAMED = 16
SHARE_GPUS = "SLOPE_SHARE_GPUS"
READY = "ready"


class NotMet(ValueError):
    """The run cannot begin. Every rank says it: which of them somebody looks at, and which is missing, is not known."""


def meet(timeout: datetime.timedelta):
    """Wait until all ranks of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT have come; every rank calls it.

    Returns:
        the store, to be kept until torch has opened its own: rank 0's serves both. None for a single rank.
    Raises:
        NotMet: on all ranks alike: some did not come, or two have the same GPU; on this one: rank 0 does not answer.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:
        return None
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if rank == 0:
        what = f"rank 0 cannot open {where}"
        way_out = "give another MASTER_PORT, or the MASTER_ADDR of the node that rank 0 is on"
    else:
        what, way_out = f"rank {rank} gets no answer from rank 0 at {where}", "is rank 0 started, and that port open?"
    try:
        with saying(f"rank {rank} of {world} waits for rank 0 at {where}, which does not answer yet"):
            store = open_store(rank, world, timeout)
    except (RuntimeError, OSError) as error:
        raise NotMet(f"{what} ({str(error).splitlines()[0]}): {way_out}") from None
    # A launcher that starts ranks again keeps its store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    words = dist.PrefixStore(f"slope/{attempt}", store)
    try:
        gather(words, rank, world, own_gpu(), where, timeout.total_seconds())
    except dist.DistNetworkError as error:
        raise NotMet(f"rank {rank} has lost rank 0 at {where} ({str(error).splitlines()[0]}): see why") from None
    return store


def open_store(rank: int, world: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """The store of `env://`, which torch opens a second time in the same process; rank 0's waits for nobody.

    Raises:
        RuntimeError: rank 0 cannot open its port, or does not answer within `timeout`.
    """
    # torchrun may serve it: then rank 0 is one of those that ask.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, world, serves, timeout, wait_for_workers=False, multi_tenant=True)


def own_gpu() -> str:
    """Which GPU this process has taken, of all machines' GPUs; empty where that is none, or meant to be shared."""
    if not torch.cuda.is_available() or os.environ.get(SHARE_GPUS) == "1":
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    uuid = visible if "MIG" in visible else torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return f"{kernel().split()[:1]} {uuid}"


def gather(store, rank: int, world: int, gpu: str, where: str, seconds: float) -> None:
    """All ranks' words in the store, and rank 0's on them."""
    store.set(f"rank/{rank}", f"{socket.gethostname()}\n{gpu}")
    store.add("come", 1)
    if rank == 0:
        store.set("answer", await_all(store, world, where, seconds))
    else:
        until = time.monotonic() + 2 * seconds
        with saying(f"rank {rank} of {world} waits at {where} for what rank 0 finds, which names who is missing"):
            while not store.check(["answer"]):
                if time.monotonic() > until:
                    raise NotMet(f"rank {rank} has heard nothing of rank 0 for {2 * seconds:.0f} s: see its output")
                time.sleep(POLL_SECONDS)
    answer = store.get("answer").decode()
    if answer != READY:
        store.add("heard", 1)
        if rank == 0:
            await_heard(store)
        raise NotMet(answer)


def await_heard(store) -> None:
    """Keep rank 0's store until all that have come know why the run does not begin, or do not ask any more."""
    until = time.monotonic() + FAREWELL_SECONDS
    while store.add("heard", 0) < store.add("come", 0) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)


def await_all(store, world: int, where: str, seconds: float) -> str:
    """Rank 0's wait: READY, or one sentence that says why the run cannot begin."""
    began = time.monotonic()
    speaks_after = QUIET_SECONDS
    while store.add("come", 0) < world:
        waited = time.monotonic() - began
        if waited > min(speaks_after, seconds):
            text = missing(store, world, where)
            if waited > seconds:
                return f"{text} after {seconds:.0f} s: start all of them, or fewer: WORLD_SIZE says how many there are"
            logger.warning("waiting: %s", text)
            speaks_after += REPEAT_SECONDS
        time.sleep(POLL_SECONDS)
    return same_gpu(store, world) or READY


def missing(store, world: int, where: str) -> str:
    absent = [rank for rank in range(world) if not store.check([f"rank/{rank}"])]
    named = ", ".join(map(str, absent[:MOST_NAMED])) + (", ..." if len(absent) > MOST_NAMED else "")
    return f"of {world} ranks that are to meet at {where}, {len(absent)} have not come (rank {named})"


def same_gpu(store, world: int) -> str | None:
    """Two ranks that have taken one GPU, which NCCL refuses in words about itself."""
    taken: dict[str, int] = {}
    for rank in range(world):
        host, gpu = store.get(f"rank/{rank}").decode().split("\n")
        if gpu and gpu in taken:
            return (
                f"ranks {taken[gpu]} and {rank} on {host} have the same GPU: start one rank for each GPU, let every "
                f"task see its own or all of them, or set {SHARE_GPUS}=1 to try a layout with ranks that share GPUs"
            )
        taken[gpu] = rank
    return None


@contextlib.contextmanager
def saying(text: str) -> Iterator[None]:
    """Log a sentence on this rank, whichever it is, if what is inside takes long."""
    timer = threading.Timer(QUIET_SECONDS, lambda: logger.error("waiting: %s", text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
