"""Starting the ranks of bench_parallel, and taking their rows as they come; what each rank does is in parallel.py."""

import faulthandler
import json
import os
from pathlib import Path

from slope_megatron.bench.work import ROWS
from slope_megatron.launch.ports import free_port

# Seconds past the budget after which ranks print where they stand and leave.
GRACE = 60


def play_rank(rank: int, world: int, port: int, work) -> None:
    """One spawned process."""
    if work.seconds is not None:
        # Where a rank stands in a collective whose peers do not come, say; of no use to wait for it any longer.
        faulthandler.dump_traceback_later(max(1.0, work.clock().left() + GRACE), exit=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # Kernels start in the order in which they were asked for: a collective before the product that covers it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    from slope_megatron.bench.parallel import play

    play(work)


def run_ranks(world: int, work, keep) -> None:
    """Start `world` ranks and wait for them; `keep` is handed their rows whenever there are new ones.

    Raises:
        torch.multiprocessing.ProcessException: a rank failed.
    """
    import torch.multiprocessing

    port = free_port()
    path = Path(work.folder, ROWS)
    path.unlink(missing_ok=True)
    context = torch.multiprocessing.spawn(play_rank, args=(world, port, work), nprocs=world, join=False)
    seen, done = "", False
    while not done:
        try:
            done = context.join(timeout=1)
        finally:
            text = path.read_text() if path.is_file() else ""
            if text != seen:
                seen = text
                keep(json.loads(text))
