"""The upstream's own scripts, patched, train a 2:4 model: where a checkout is at hand, on the CPU or on a GPU."""

import contextlib
import importlib.machinery
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from integrations.test_patches import CHECKOUTS, PATCHES, apply

from slope_megatron.launch.ports import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
STEPS = 20
FLAGS = f"""
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --seed 7
--micro-batch-size 1 --global-batch-size 4 --train-iters {STEPS} --lr 3e-3 --min-lr 3e-3 --lr-decay-style constant
--log-interval 1 --eval-iters 0 --eval-interval 1000 --split 100,0,0
--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion
--attention-dropout 0 --hidden-dropout 0 --num-workers 0 --transformer-impl local
--no-persist-layer-norm --no-bias-swiglu-fusion --no-rope-fusion --slope --slope-backward-mask-interval 4
""".split()
# Megatron-DeepSpeed's; its parser knows fewer.
DEEPSPEED_FLAGS = f"""
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --seed 7
--micro-batch-size 1 --global-batch-size 4 --train-iters {STEPS} --lr 3e-3 --min-lr 3e-3 --lr-decay-style constant
--log-interval 1 --eval-iters 0 --eval-interval 1000 --split 100,0,0
--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion
--attention-dropout 0 --hidden-dropout 0 --num-workers 0 --slope --slope-backward-mask-interval 4
--tokenizer-type NullTokenizer --vocab-size 127 --deepspeed --zero-stage 1 --no-pipeline-parallel
""".split()
# Of a script, until it has ended; GPUs are fast, and hours on them dear.
PATIENCE, PATIENCE_ON_GPU = 300, 150
GPT = "--tokenizer-type NullTokenizer --vocab-size 127 --no-create-attention-mask-in-dataloader".split()
BERT = "--tokenizer-type BertWordPieceLowerCase --legacy-tokenizer --spec local".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def corpus(prefix: Path, sentences: int = 1) -> None:
    """Megatron's indexed format: 64 documents, cut into `sentences`, in which each token says the next."""
    documents = [((np.arange(144) * 7 + start) % 112 + 8).astype(np.uint16) for start in range(64)]
    parts = [part for document in documents for part in np.split(document, sentences)]
    prefix.with_suffix(".bin").write_bytes(b"".join(part.tobytes() for part in parts))
    sizes = np.array([len(part) for part in parts], np.int32)
    starts = np.concatenate(([0], np.cumsum(sizes[:-1], dtype=np.int64) * 2))
    ends = np.arange(len(documents) + 1, dtype=np.int64) * sentences
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(ends))
    prefix.with_suffix(".idx").write_bytes(head + sizes.tobytes() + starts.tobytes() + ends.tobytes())


def checkout_of(version: str, name: str, folder: Path) -> Path:
    """A patched copy of a checkout at hand, which is left as it was; skips where there is none."""
    path = next(path for path in PATCHES if path.parent.name == version and path.stem == name)
    patch = apply.Patch(path)
    found = [file for file in Path(CHECKOUTS or "/nowhere").glob(f"*/{patch.file}")]
    found = [file for file in found if apply.blob(file.read_bytes()) in (patch.before, patch.after)]
    if not found:
        pytest.skip(f"no checkout with blob {patch.before[:12]} of {patch.file} in $SLOPE_UPSTREAM_CHECKOUTS")
    checkout = folder / "checkout"
    shutil.copytree(found[0].parent, checkout, ignore=shutil.ignore_patterns(".git", "tests", "docs", "images"))
    apply.run(path.relative_to(apply.FOLDER).parts[0], checkout, undo=False, check=False)
    # A checkout has not the wheel's compiled helpers.
    import megatron.core.datasets as datasets

    suffix, target = importlib.machinery.EXTENSION_SUFFIXES[0], checkout / "megatron" / "core" / "datasets"
    for compiled in (path for place in datasets.__path__ for path in Path(place).glob(f"*{suffix}")):
        if target.is_dir():  # Megatron-DeepSpeed compiles its own
            shutil.copy(compiled, target)
    return checkout / patch.file


def run(script: Path, *flags, world: int = 1, gpu: bool = False, more=()) -> subprocess.CompletedProcess:
    """The script on `world` ranks; what the last one returned, which is the one that logs.

    Args:
        more: folders of packages that the script is to find.
    """
    common = {"LOCAL_WORLD_SIZE": str(world), "WORLD_SIZE": str(world), "TORCHDYNAMO_DISABLE": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    # What this process finds, in folders of its own perhaps, is found there too.
    found = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    common |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests", *more, *found)))}
    starter, own, backend = "upstream_on_gpu.py" if gpu else "cpu_for_cuda.py", FLAGS, "nccl" if gpu else "gloo"
    if "--deepspeed_config" in flags:
        starter, own = "megatron_deepspeed.py", DEEPSPEED_FLAGS
        common |= {} if gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "LOCAL_SIZE": str(world)}
    command = [sys.executable, HELPERS / starter, script.parent, script, *own, *map(str, flags)]
    command += ["--distributed-backend", backend]
    with contextlib.ExitStack() as others:
        for rank in range(world - 1):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            others.enter_context(subprocess.Popen(command, env={**os.environ, **common, **place}, **quiet))
        place = {"RANK": str(world - 1), "LOCAL_RANK": str(world - 1)}
        environment = {**os.environ, **common, **place}
        last = others.enter_context(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return outcome(last, PATIENCE_ON_GPU if gpu else PATIENCE)


def outcome(process: subprocess.Popen, seconds: float) -> subprocess.CompletedProcess:
    """What a script said; one that is not done in time fails its test with that."""
    try:
        said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        pytest.fail(f"not done in {seconds} s; it said:\n{out[-3000:]}\n{errors[-6000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def losses(result: subprocess.CompletedProcess) -> list[float]:
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-4000:]
    return [float(text) for text in re.findall(r"lm loss: (\S+)", result.stdout)]


def check_operands(result: subprocess.CompletedProcess, kind: str, linears: int, patterns_every: int = 4) -> None:
    """After each step the operands are the new values; before it they were not, and patterns change in their turn."""
    found = re.findall(
        rf"operands: step (\d+), {linears} linears of {kind}, forward (\d+) -> (\d+), dgrad (\d+) -> (\d+), "
        r"new patterns (\d+)",
        result.stdout,
    )
    assert [int(step) for step, *_ in found] == list(range(1, STEPS + 1))
    for step, forward, forward_after, dgrad, dgrad_after, new in (map(int, line) for line in found):
        assert forward > 0 and dgrad > 0 and forward_after == dgrad_after == 0, f"step {step}"
        assert (new > 0) == (step % patterns_every == 0), f"step {step}"


@pytest.mark.parametrize("version", ["core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0", "main_d98e8a64"])
def test_megatron_lm_trains_a_sparse_gpt(version, tmp_path):
    script = checkout_of(version, "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    result = run(script, *GPT, "--data-path", tmp_path / "corpus")
    found = losses(result)
    assert len(found) == STEPS and found[-1] < found[0] - 1.0
    check_operands(result, "ReferenceOperands", linears=7)


def test_adapters_join_resume_and_are_the_same_at_two_ranks(tmp_path):
    """They join at step 15 of 20; one run is parted at 17, after that."""
    script = checkout_of("core_v0.16.1", "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    common = [*GPT, "--data-path", tmp_path / "corpus", "--slope-adapter-rank", 4, "--slope-lazy-fraction", 0.25]
    whole = run(script, *common)
    expected = losses(whole)
    assert "step 15 of 20: the adapters join" in whole.stdout + whole.stderr
    save = ["--save", tmp_path / "saved", "--save-interval", 17]
    assert losses(run(script, *common, *save, "--exit-interval", 17)) == expected[:17]
    # In the second line after a start the upstream logs the mean of both.
    first, second, third = expected[17:]
    found = losses(run(script, *common, "--load", tmp_path / "saved"))
    assert found == [first, pytest.approx((first + second) / 2, abs=1e-6), third]
    # The upstream pads the vocabulary to a multiple of this for each rank.
    cut = ["--tensor-model-parallel-size", 2, "--make-vocab-size-divisible-by", 64]
    assert losses(run(script, *common, *cut, world=2)) == pytest.approx(expected, rel=1e-5)


def test_a_dense_checkpoint_is_pruned_as_it_is_loaded(tmp_path):
    """Saved on one rank, all blocks in one tensor; by magnitude unless --slope-pattern says otherwise."""
    script = checkout_of("core_v0.16.1", "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    common = [*GPT, "--data-path", tmp_path / "corpus", "--make-vocab-size-divisible-by", 64]
    dense = losses(run(script, *common, "--no-slope", "--save", tmp_path / "dense", "--save-interval", STEPS))
    load = [*common, "--pretrained-checkpoint", tmp_path / "dense", "--load", tmp_path / "none", "--seed", 8]
    result = run(script, *load)
    found = losses(result)
    said = result.stdout + result.stderr
    assert "are pruned, the largest stay (--slope-pattern magnitude), and training begins" in said
    # Of an untrained model the first loss is the logarithm of 128, 4.85.
    assert len(found) == STEPS and found[0] < 4.4 and found[-1] < dense[-1] + 0.5
    two = run(script, *load, "--tensor-model-parallel-size", 2, world=2)
    assert losses(two) == pytest.approx(found, rel=1e-5)
    at_random = losses(run(script, *load, "--slope-pattern", "random"))
    assert at_random[0] > found[0]


def test_megatron_lm_trains_a_sparse_bert(tmp_path):
    script = checkout_of("core_v0.16.1", "pretrain_bert", tmp_path)
    corpus(tmp_path / "corpus", sentences=9)
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *(f"w{index}" for index in range(123))]))
    flags = [*BERT, "--vocab-file", tmp_path / "vocab.txt", "--data-path", tmp_path / "corpus"]
    # The upstream divides by a micro-batch's masked tokens: of one short sample, there may be none.
    result = run(script, *flags, "--micro-batch-size", 4, "--global-batch-size", 16)
    found = losses(result)
    assert len(found) == STEPS and np.mean(found[-5:]) < found[0] - 0.5
    check_operands(result, "ReferenceOperands", linears=7)


def test_bert_without_transformer_engine_asks_for_the_local_spec(tmp_path):
    script = checkout_of("core_v0.16.1", "pretrain_bert", tmp_path)
    flags = [flag for flag in BERT if flag not in ("--spec", "local")]
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL))
    result = run(script, *flags, "--vocab-file", tmp_path / "vocab.txt", "--mock-data")
    assert "the default layer spec needs Transformer Engine, which is not installed" in result.stderr


def deepspeed_config(folder: Path, **more) -> list:
    """The flags that name a DeepSpeed configuration of `FLAGS`' batches, ZeRO-1."""
    sizes = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**6}
    path = folder / "ds.json"
    path.write_text(json.dumps({**sizes, "zero_optimization": {"stage": 1}, **more}))
    return ["--deepspeed_config", path]


def test_megatron_deepspeed_trains_a_sparse_gpt(tmp_path):
    script = checkout_of("main_4efb479d", "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    result = run(script, "--data-path", tmp_path / "corpus", *deepspeed_config(tmp_path))
    found = losses(result)
    assert len(found) == STEPS and found[-1] < found[0] - 1.0
    check_operands(result, "ReferenceOperands", linears=7)


def test_a_script_that_stands_still_fails_with_what_it_said():
    command = [sys.executable, "-c", "import time; print('compiling', flush=True); time.sleep(3600)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pytest.raises(pytest.fail.Exception, match="not done in 5 s; it said:\ncompiling"):
        outcome(process, 5)


# Tokens of a micro-batch are at least as many as the widest side, by which the operands are read.
ON_GPU = "--hidden-size 128 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 4 --global-batch-size 8"


def check_like_reference(script, common):
    """A script on 2:4 units against the same on the reference backend."""
    result = run(script, *common, "--slope-backend", "cusparselt", gpu=True)
    found = losses(result)
    expected = losses(run(script, *common, "--slope-backend", "reference", gpu=True))
    # bf16, and sums in another order: near at first, on the same way later.
    assert found[:3] == pytest.approx(expected[:3], rel=1e-3)
    assert found == pytest.approx(expected, rel=0.05) and found[-1] < found[0] - 0.3
    check_operands(result, "CusparseltOperands", linears=7)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("version", "name"),
    [("core_v0.16.1", "pretrain_gpt"), ("core_v0.16.1", "pretrain_bert"), ("main_d98e8a64", "pretrain_gpt")],
)
def test_megatron_lm_on_a_gpu_is_as_on_the_reference_backend(version, name, tmp_path):
    script = checkout_of(version, name, tmp_path)
    corpus(tmp_path / "corpus", sentences=1 if name == "pretrain_gpt" else 9)
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *(f"w{index}" for index in range(123))]))
    own = GPT if name == "pretrain_gpt" else [*BERT, "--vocab-file", tmp_path / "vocab.txt"]
    common = [*own, *ON_GPU.split(), "--bf16", "--data-path", tmp_path / "corpus"]
    check_like_reference(script, common)


@pytest.mark.gpu
def test_megatron_deepspeed_on_a_gpu_is_as_on_the_reference_backend(tmp_path):
    """Where it stands still, every thread's stack is on standard error, each 30 s."""
    script = checkout_of("main_4efb479d", "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}
    common = [*ON_GPU.split(), "--bf16", "--data-path", tmp_path / "corpus", *deepspeed_config(tmp_path, **sizes)]
    check_like_reference(script, common)
