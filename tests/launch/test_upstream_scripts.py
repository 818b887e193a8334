"""The upstream's own scripts, patched, train a 2:4 model: where a checkout is at hand, on the CPU."""

import importlib.machinery
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch.test_patches import CHECKOUTS, PATCHES, apply

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "helpers" / "cpu_for_cuda.py"
STEPS = 20
FLAGS = f"""
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --seed 7
--micro-batch-size 1 --global-batch-size 4 --train-iters {STEPS} --lr 3e-3 --min-lr 3e-3 --lr-decay-style constant
--log-interval 1 --eval-iters 0 --eval-interval 1000 --tokenizer-type NullTokenizer --vocab-size 127 --split 100,0,0
--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion
--attention-dropout 0 --hidden-dropout 0 --num-workers 0 --transformer-impl local --distributed-backend gloo
--no-persist-layer-norm --no-bias-swiglu-fusion --no-rope-fusion --no-create-attention-mask-in-dataloader
--slope --slope-backward-mask-interval 4
""".split()


def corpus(prefix: Path) -> None:
    """Megatron's indexed format: 64 documents in which each token says the next."""
    documents = [((np.arange(144) * 7 + start) % 120).astype(np.uint16) for start in range(64)]
    prefix.with_suffix(".bin").write_bytes(b"".join(document.tobytes() for document in documents))
    sizes = np.array([len(document) for document in documents], np.int32)
    starts = np.concatenate(([0], np.cumsum(sizes[:-1], dtype=np.int64) * 2))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
    index = head + sizes.tobytes() + starts.tobytes() + np.arange(len(sizes) + 1, dtype=np.int64).tobytes()
    prefix.with_suffix(".idx").write_bytes(index)


@pytest.mark.parametrize("version", ["core_v0.16.1", "main_d98e8a64"])
def test_megatron_lm_trains_a_sparse_model(version, tmp_path):
    patch = next(apply.Patch(path) for path in PATCHES if path.parent.name == version and "gpt" in path.name)
    found = [path for path in Path(CHECKOUTS or "/nowhere").glob(f"*/{patch.file}")]
    found = [path for path in found if apply.blob(path.read_bytes()) in (patch.before, patch.after)]
    if not found:
        pytest.skip(f"no checkout with blob {patch.before[:12]} of {patch.file} in $SLOPE_UPSTREAM_CHECKOUTS")
    content = found[0].read_bytes()
    script = tmp_path / patch.file
    script.write_bytes(content if apply.blob(content) == patch.after else patch.add(content))
    # A checkout without the wheel's compiled helpers: ours, of a copy, so that the checkout is left as it was.
    checkout = tmp_path / "checkout"
    shutil.copytree(found[0].parent, checkout, ignore=shutil.ignore_patterns(".git", "tests", "docs", "images"))
    import megatron.core.datasets as datasets

    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    for folder in datasets.__path__:
        for path in Path(folder).glob(f"*{suffix}"):
            shutil.copy(path, checkout / "megatron" / "core" / "datasets")
    corpus(tmp_path / "corpus")
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHDYNAMO_DISABLE": "1"}
    one_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    one_rank |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, SHIM, checkout, script, *FLAGS, "--data-path", tmp_path / "corpus"]
    result = subprocess.run(command, env={**os.environ, **one_rank}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    losses = [float(text) for text in re.findall(r"lm loss: (\S+)", result.stdout)]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1.0
