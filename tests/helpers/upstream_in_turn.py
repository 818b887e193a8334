"""Runs an upstream training script several times in one process a rank, without a GPU: its start is paid once.

    python upstream_in_turn.py CHECKOUT SCRIPT RUNS.json      RUNS: [{"port": ..., "flags": [...]}, ...]

The process ends with the first run that fails; each run begins with the line `== run N`.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

from helpers.cpu_for_cuda import prepare


def forget() -> None:
    """What a run leaves behind in the process, as the upstream's own restarts within a process drop it."""
    import torch
    from megatron.training.training import destroy_global_state

    destroy_global_state()
    torch.distributed.destroy_process_group()
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    gc.collect()


def main(checkout: str, script: str, runs: str) -> None:
    prepare(checkout)
    for index, each in enumerate(json.loads(Path(runs).read_text())):
        print(f"== run {index}", flush=True)
        os.environ["MASTER_PORT"] = str(each["port"])
        # Of Transformer Engine, which the upstream wants set as the flag is.
        os.environ["NVTE_APPLY_QK_LAYER_SCALING"] = str(int("--apply-query-key-layer-scaling" in each["flags"]))
        sys.argv = [script, *each["flags"]]
        runpy.run_path(script, run_name="__main__")
        forget()


if __name__ == "__main__":
    main(*sys.argv[1:])
