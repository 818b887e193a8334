"""Every Triton kernel compiles for A100 and Hopper, without a GPU, into what its design says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# A thread's words are its own in these: nothing is passed through shared memory.
OWN_THEIR_WORDS = [
    "refresh",
    "choose_bf16",
    "choose_fp16",
    "row_metadata",
    "gated_silu",
    "gated_gelu",
    "gated_gelu_tanh",
    "logit_gradient",
]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_without_spills_or_layout_conversions(architecture, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    paths = [str(TESTS.parent), str(TESTS.parent / "kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = [sys.executable, str(TESTS / "helpers" / "offline_kernels.py"), str(architecture)]
    run = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {row.pop("kernel"): row for row in map(json.loads, run.stdout.splitlines())}
    assert {name: row["stack"] for name, row in found.items()} == dict.fromkeys(found, 0)
    assert {name: found[name]["shared"] for name in OWN_THEIR_WORDS} == dict.fromkeys(OWN_THEIR_WORDS, 0)
    # A whole pair of 16-bit tiles a buffer: with one less, a tile is overwritten while others multiply it. Hopper's
    # products are asynchronous and need one for each stage, A100's one less.
    idle = 0 if architecture == 90 else 1
    assert found["down_128"]["shared"] == 2 * (3 - idle) * (64 * 128 + 128 * 128)
    assert found["down_256"]["shared"] == 2 * (4 - idle) * (64 * 64 + 64 * 256)
