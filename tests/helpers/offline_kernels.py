"""Compiles the Triton kernels without a GPU: `python offline_kernels.py ARCHITECTURE` prints a JSON line a kernel.

A process of its own, because the tests around it run kernels in Triton's interpreter, and that is chosen at import.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slope_kernels.triton import choose, cross_entropy, gated_activation, gather, low_rank, metadata, refresh, update

REFRESH = {"values": "*i32", "row_bits": "*u16", "column_bits": "*u8", "forward": "*i32", "backward": "*i32"}
REFRESH |= {name: "i32" for name in ("groups", "chunks", "forward_tile_rows", "forward_tile_stride")}
REFRESH |= {name: "i32" for name in ("backward_tile_rows", "backward_tile_stride")}
BOTH = {"WRITE_FORWARD": True, "WRITE_BACKWARD": True, "FORWARD_TILED": True, "BACKWARD_TILED": True}
MASKS = {"row_masks": "*i32", "column_masks": "*u16"}
GATHER = {"dense": "*i64", "row_bits": "*u8", "packed": "*i32", "groups": "i32"}
DOWN = dict.fromkeys(("x", "again", "factor", "hidden", "joined"), "*bf16") | {"scale": "fp32"}
DOWN |= {name: "i32" for name in ("tokens", "x_stride", "factor_row", "joined_stride")}
ACCUMULATE = {"total": "*fp32", "gradient": "*bf16", "elements": "i32"}
ADAMW = dict.fromkeys(("master", "mean", "square", "gradient", "step"), "*fp32") | {"weight": "*bf16"}
ADAMW |= {"elements": "i32"} | dict.fromkeys(("coefficient", "lr", "decay", "eps"), "fp32")
ADAMW |= dict.fromkeys(("beta1", "rest1", "log_beta1", "beta2", "rest2", "log_beta2"), "fp32")
ROWS = {"logits": "*bf16", "labels": "*i64", "normalizer": "*fp32", "width": "i32"}
STATISTICS = ROWS | {"chosen": "*fp32"}
LOGIT_GRADIENT = ROWS | {"weight": "*fp32", "gradient": "*bf16", "blocks": "i32"}
GATED = dict.fromkeys(("dy", "x", "bias", "dx"), "*bf16") | {"width": "i32", "blocks": "i32"}


def gated(activation: str, biased: bool) -> tuple:
    constants = {"ACTIVATION": activation, "BIASED": biased, "BLOCK": gated_activation.BLOCK}
    return gated_activation._gradient_kernel, GATED, constants, gated_activation.WARPS


def down(block_p: int) -> tuple:
    """`down` at a rank that fills `block_p`."""
    tokens, columns, stages, warps = low_rank.down_blocks(block_p)
    constants = {"factor_column": 1, "COLUMNS": 2560, "RANK": block_p, "PADDED": block_p}
    constants |= {"BLOCK_T": tokens, "BLOCK_S": columns, "BLOCK_P": block_p}
    return low_rank._down_kernel, DOWN, constants, warps, stages


# name: (kernel, types of its arguments, its constants, warps, perhaps stages).
KERNELS = {
    "refresh": (
        refresh._refresh_kernel,
        REFRESH,
        {**BOTH, "LANES_G": 4, "LANES_C": 16, "BAND": 4},
        2,
    ),
    "choose_bf16": (
        choose._choose_kernel,
        {"values": "*i32", **MASKS, "words": "i32", "tiles": "i32"},
        {"IS_BF16": True, "THREADS": 128},
        4,
    ),
    "choose_fp16": (
        choose._choose_kernel,
        {"values": "*i32", **MASKS, "words": "i32", "tiles": "i32"},
        {"IS_BF16": False, "THREADS": 128},
        4,
    ),
    "row_metadata": (
        metadata._row_metadata_kernel,
        {"row_masks": "*i32", "metadata": "*i32", "group_blocks": "i32"},
        {"BLOCKS": 4, "SETS": 16},
        16,
    ),
    "column_metadata": (
        metadata._column_metadata_kernel,
        {**MASKS, "metadata": "*i32", "group_blocks": "i32"},
        {"THREADS": 32, "WORDS": 288},
        1,
    ),
    "gather": (gather._gather_kernel, GATHER, {"BLOCK": gather.BLOCK}, 4),
    "gather_add": (
        gather._gather_add_kernel,
        {"dense": "*i64", "row_bits": "*u8", "total": "*fp32", "groups": "i32"},
        {"BLOCK": gather.BLOCK, "IS_BF16": True},
        4,
    ),
    "down_128": down(128),
    "down_256": down(256),
    "accumulate": (update._accumulate_kernel, ACCUMULATE, {"BLOCK": update.ACCUMULATED}, 4),
    "adamw": (update._adamw_kernel, ADAMW, {"BLOCK": update.UPDATED}, 4),
    "statistics": (
        cross_entropy._statistics_kernel,
        STATISTICS,
        {"STEPS": 32, "LANES": cross_entropy.LANES},
        cross_entropy.ROW_WARPS,
    ),
    "logit_gradient": (
        cross_entropy._gradient_kernel,
        LOGIT_GRADIENT,
        {"Z_LOSS": 1e-4, "BLOCK": cross_entropy.BLOCK},
        cross_entropy.WARPS,
    ),
    "gated_silu": gated("silu", False),
    "gated_gelu": gated("gelu", True),
    "gated_gelu_tanh": gated("gelu_tanh", True),
    "unpack": (gather._unpack_kernel, GATHER, {"BLOCK": gather.BLOCK}, 4),
}


def compiled(architecture: int, kernel, arguments: dict, constants: dict, warps: int, stages: int = 3) -> dict:
    """Shared memory (bytes), stack (bytes, spills among them) and registers of one kernel."""
    if "NATIVE" in kernel.arg_names:
        constants = {**constants, "NATIVE": True}
    names = kernel.arg_names
    types = {name: arguments.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in arguments}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    built = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "num_stages": stages}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    return {"shared": built.metadata.shared, "stack": int(stack), "registers": int(registers)}


if __name__ == "__main__":
    for name, parts in KERNELS.items():
        print(json.dumps({"kernel": name, **compiled(int(sys.argv[1]), *parts)}), flush=True)
