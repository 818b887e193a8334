"""All-reduce within a node and across nodes, timed, against a floor.

Bus bandwidth as NCCL's tests define it: 2 (n - 1) / n x bytes / seconds, comparable to a link's own figure.
"""

import datetime
import time

from slope_megatron.launch.ranks import Ranks
from slope_megatron.preflight.node_checks import Finding

GPU_BYTES = 256 * 2**20
CPU_BYTES = 8 * 2**20
ROUNDS = 5


def bus_bandwidth(ranks: int, size: int, seconds: float) -> float:
    """GB/s."""
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def against_floor(what: str, gbs: float, floor: float) -> Finding:
    """A measured bandwidth against the floor; 0: none."""
    text = f"{what}: {gbs:.2f} GB/s"
    if gbs >= floor:
        return Finding("all-reduce", True, text)
    advice = "look at NCCL_ENV and the network, or exclude the node"
    return Finding("all-reduce", False, f"{text}, below the floor of {floor} (BANDWIDTH_FLOOR_GBS): {advice}")


def within_node(floor: float) -> list[Finding]:
    """All GPUs of this node, driven by this one process."""
    import torch
    from torch.cuda import nccl

    count = torch.cuda.device_count()
    if count < 2:
        return []
    tensors = [torch.ones(GPU_BYTES // 4, device=f"cuda:{index}") for index in range(count)]

    def once() -> None:
        nccl.all_reduce(tensors)
        for index in range(count):
            torch.cuda.synchronize(index)

    return [against_floor(f"{count} GPUs of the node", bus_bandwidth(count, GPU_BYTES, fastest(once)), floor)]


def across_nodes(store, ranks: Ranks, floor: float, seconds: float) -> list[Finding]:
    """One GPU a node (or the CPUs). Each node also receives from its left neighbour, which tells whose link is slow.

    Collective: every node calls it, or none.
    """
    import torch
    import torch.distributed as dist

    if ranks.world < 2:
        return []
    cuda = torch.cuda.is_available()
    device = "cuda:0" if cuda else "cpu"
    size = GPU_BYTES if cuda else CPU_BYTES
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("bandwidth", store),
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    try:
        tensor = torch.ones(size // 4, device=device)
        received = torch.empty_like(tensor)

        # Waits for what NCCL has only been given.
        wait = torch.cuda.synchronize if cuda else lambda: None

        def reduce() -> None:
            dist.all_reduce(tensor)
            wait()

        def shift() -> None:
            right, left = (ranks.rank + 1) % ranks.world, (ranks.rank - 1) % ranks.world
            moves = [dist.P2POp(dist.isend, tensor, right), dist.P2POp(dist.irecv, received, left)]
            for work in dist.batch_isend_irecv(moves):
                work.wait()
            wait()

        gbs = bus_bandwidth(ranks.world, size, fastest(reduce))
        link = size / fastest(shift) / 1e9
        whole = against_floor(f"{ranks.world} nodes", gbs, floor)
        # A slow all-reduce is everybody's: only the nodes at a slow link are to blame, if there are any.
        slow = torch.tensor([float(link < floor)], device=device)
        dist.all_reduce(slow)
        if not whole.ok and 0 < slow.item() < ranks.world and link >= floor:
            whole = Finding("all-reduce", True, f"{whole.text}, by other nodes' links")
        return [whole]
    finally:
        dist.destroy_process_group()


def fastest(function) -> float:
    """The least of a few rounds, after one that warms up."""
    function()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)
