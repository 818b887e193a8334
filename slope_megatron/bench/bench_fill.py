"""How long a rank takes at its start for one block: values and row pattern of each linear, and its second pruning.

Drawn from the counter generator as in a run, on the device where the parameters are: a GPU if there is one. A run waits
for its rank's blocks, one after the other, and for a share of the embedding, whose numbers cost less.
"""

import os
import time

from slope_megatron.bench.common import print_table, rounded, write_csv
from slope_megatron.bench.models import MODELS, TINY, Model
from slope_megatron.bench.progress import Clock, add_budget

KNOWN = {**MODELS, TINY.name: TINY}


def add_arguments(parser) -> None:
    parser.add_argument("--models", nargs="+", default=["opt-13b", "opt-66b"], choices=list(KNOWN))
    parser.add_argument("--tensor-parallel", type=int, default=4, help="ranks that share a linear")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add_budget(parser)
    parser.add_argument("--out", help="folder for the CSV; default: the current one")


def packed_weight(rows: int, columns: int, device: str):
    """A linear's packed weight without the linear: `init_weight` needs neither ranks nor Megatron's constructor."""
    import torch

    from slope_megatron.config import SlopeConfig
    from slope_megatron.layers.packed_weight import PackedWeight

    class Weight(PackedWeight):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.slope = SlopeConfig()
            self.weight = torch.nn.Parameter(torch.zeros(rows, columns // 2, dtype=torch.bfloat16, device=device))
            self.register_buffer("weight_pattern", torch.zeros(rows, columns // 8, dtype=torch.uint8, device=device))
            self.register_buffer("weight_column", torch.zeros(rows, columns // 16, dtype=torch.uint8, device=device))

    return Weight()


def measured(model: Model, linear: str, tensor_parallel: int, device: str) -> dict:
    """One linear's row; the first of a process also holds what its kernels take to load."""
    import torch

    from slope_megatron.layers.packed_weight import Region

    rows, columns = model.linears(tensor_parallel)[linear]
    weight = packed_weight(rows, columns, device)

    def timed(function, *arguments) -> float:
        started = time.perf_counter()
        function(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    fill = timed(weight.init_weight, 1234, Region(linear, range(rows), 0, 0, columns), 0.02)
    pruning = timed(weight.update_column_pattern)
    row = {"model": model.name, "tp": tensor_parallel, "linear": linear, "rows": rows, "columns": columns}
    times = {"fill_s": fill, "second_pruning_s": pruning, "ns_per_weight": (fill + pruning) / rows / columns * 1e9}
    return rounded(row | times)


def main(arguments) -> int:
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda and this machine has no CUDA device: leave it out")
    where = f"on {device}, {torch.get_num_threads()} threads of {os.cpu_count()} processors"
    clock, rows = Clock(arguments.seconds), []
    for name in clock.within(arguments.models):
        for linear in KNOWN[name].linears():
            rows.append(measured(KNOWN[name], linear, arguments.tensor_parallel, device))
            path = write_csv("fill", rows, arguments.out, where)
    print_table(rows, list(rows[0]))
    for name in dict.fromkeys(row["model"] for row in rows):
        seconds = sum(row["fill_s"] + row["second_pruning_s"] for row in rows if row["model"] == name)
        print(f"a block of {name} at TP {arguments.tensor_parallel}: {seconds:.3g} s {where}")
    print(f"wrote {path}")
    return 0
