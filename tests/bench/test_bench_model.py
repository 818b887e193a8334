"""`slope bench model` on a CPU and a small model: its visits, what it counts, and that nothing of an engine stays."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slope_megatron import cli
from slope_megatron.bench.busy import BOARD

ROOT = Path(__file__).resolve().parents[2]
TINY = "--cpu --model tiny --layers 2 --micro-batch 2 --micro-batches 2 --steps 2 --warmup 2".split()
TIMES = {"step_ms", "spread", "tokens_per_second", "ratio", "start_s"}
# Of 2 blocks of width 64 with 4 heads: the blocks' linears, and the first one, which stays dense.
LINEARS, FIRST_LINEAR = 2 * 12 * 64 * 64, 3 * 64 * 64


def measured(folder, *words):
    """Note and rows of the CSV, and what was said."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    line = [sys.executable, "-m", "slope_megatron", "bench", "model", *TINY, *words, "--out", str(folder)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    with (folder / "model.csv").open() as file:
        return file.readline(), list(csv.DictReader(file)), done.stderr


def test_engines_are_visited_there_and_back(tmp_path):
    note, rows, _ = measured(tmp_path, "--modes", "dense", "paper")
    assert [(row["mode"], row["visit"]) for row in rows] == [
        ("dense", "1"),
        ("paper", "1"),
        ("paper", "2"),
        ("dense", "2"),
    ]
    assert note.startswith("# on a CPU: these times say nothing; tiny, ") and "2 of 4 layers" in note
    for there, back in ((rows[0], rows[3]), (rows[1], rows[2])):
        assert {name for name in there if there[name] != back[name]} <= TIMES | {"visit"}
    dense, paper = (int(row["parameters"]) for row in rows[:2])
    # Embedding (100 rows are padded to 384), 64 positions, and of each block biases and norms; the last norm.
    small = 384 * 64 + 64 * 64 + 2 * (9 * 64 + 4 * 64) + 2 * 64
    assert dense == LINEARS + small and dense - paper == (LINEARS - FIRST_LINEAR) / 2
    assert {row["launch"] for row in rows} == {"eager"}, "a CPU has no CUDA graphs"
    assert rows[0]["ratio"] == "1.0" and all(float(row["tokens_per_second"]) > 0 for row in rows)
    # Packed: half of the values, fp32 gradients and state; and both patterns and the reference's operands.
    assert all(float(row["linears_gib"]) < float(row["counted_gib"]) for row in rows)
    assert not any(row[name] for row in rows for name in ("busy_ms", "busy_share", *BOARD, "peak_gib", "mfu"))
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")


def test_one_rank_of_several_is_timed_alone(tmp_path):
    note, rows, said = measured(tmp_path, "--modes", "dense-fp8", "paper", "--shard-of", "2")
    assert "dense-fp8 is left out: it is made for whole linears, without --shard-of" in said
    assert "one rank's shapes of TP 2 on one GPU, without the collectives" in note
    assert [row["shard_of"] for row in rows] == ["2", "2"] and rows[0]["loss"] == rows[1]["loss"]
    # Half of all linears and of the embedding; positions and norms whole; biases of what is cut along its outputs half.
    small = 384 * 64 / 2 + 64 * 64 + 2 * ((3 + 4) * 64 / 2 + (2 + 4) * 64) + 2 * 64
    assert int(rows[0]["parameters"]) == (LINEARS + FIRST_LINEAR) / 4 + small


def test_dense_linears_multiply_in_e4m3(ranks):
    exact, rounded, weights_follow = ranks.run(dense_losses, world=1)[0]
    assert exact[0] != rounded[0] and rounded == pytest.approx(exact, rel=0.01) and weights_follow


def dense_losses():
    """Losses of a dense engine, of one in e4m3, and whether the rounded weights are the present ones."""
    import torch

    from slope_megatron.bench import model, work
    from slope_megatron.bench.engines import BuiltEngine
    from slope_megatron.bench.models import TINY
    from slope_megatron.config import SlopeConfig
    from slope_megatron.ops.custom_ops.float8 import quantize

    one = work.ModelWork("tiny", TINY.architecture, 4, 1, 64, 1, 1, 2, 1, 0)
    losses = []
    for float8 in (False, True):
        built = BuiltEngine(model.config_of(SlopeConfig(enabled=False), one), torch.float32, float8)
        losses.append([built.step().loss for _ in range(3)])
        linears = built.rounded
        now = [quantize(linear.weight.detach(), True, True)[0] for linear in linears]
        follow = [torch.equal(linear.rounded[0], rounded) for linear, rounded in zip(linears, now, strict=True)]
        assert len(linears) == (15 if float8 else 0)  # 4 blocks of 4, the first qkv in bf16
        built.free()
    return *losses, all(follow)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model opt-2.6b --layers 33", "--layers is 33: opt-2.6b has 32; give 1 to that many"),
        ("--steps 1", "--steps is 1: it must be at least 2"),
        ("--warmup 0", "--warmup is 0: it must be at least 2"),
    ],
)
def test_what_cannot_be_timed_is_refused(words, message):
    arguments = cli.parse(["bench", "model", *words.split()])
    with pytest.raises(ValueError, match=message):
        arguments.run(arguments)


def test_a_file_in_the_place_of_the_results_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    (tmp_path / "there").write_text("")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = cli.parse(["bench", "model", *TINY, "--out", str(tmp_path / "there")])
    with pytest.raises(ValueError, match=r"--out is .*/there: no folder can be made there \(File exists\)"):
        arguments.run(arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_is_held_is_found(ranks, dtype):
    assert ranks.run(freed, dtype, world=1)[0] == ["", "1 tensors outlive their engine, such as one of (384, 64)"]


def freed(dtype):
    """What `free` says: of an engine as it is, and while a parameter is held from outside."""
    import torch

    from slope_megatron.bench import model, work
    from slope_megatron.bench.engines import BuiltEngine
    from slope_megatron.bench.models import TINY
    from slope_megatron.config import SlopeConfig

    one = work.ModelWork("tiny", TINY.architecture, 4, 1, 64, 1, 1, 2, 1, 0)
    said = []
    for held in (False, True):
        built = BuiltEngine(model.config_of(SlopeConfig(), one), getattr(torch, dtype))
        built.step()
        kept = next(built.engine.model.parameters()) if held else None
        said.append(built.free())
    assert kept is not None
    return said


def test_kernels_that_overlap_are_busy_once():
    from slope_megatron.bench.busy import union

    assert union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0
    assert union([]) == 0.0


def test_kernels_are_counted_by_the_step():
    from slope_megatron.bench.bench_model import kernels
    from slope_megatron.bench.busy import of_events

    events = [
        {"name": "gemm", "cat": "kernel", "ts": 0.0, "dur": 3000.0},
        {"name": "gemm", "cat": "kernel", "ts": 2000.0, "dur": 3000.0},
        {"name": "Memset (Device)", "cat": "gpu_memset", "ts": 9000.0, "dur": 500.0},
        {"name": "Memcpy HtoD", "cat": "gpu_memcpy", "ts": 9500.0, "dur": 500.0},
        {"name": "cudaLaunchKernel", "cat": "cuda_runtime", "ts": 0.0, "dur": 9000.0},
    ]
    found = of_events(events, 2, [{"clock_mhz": 1200.0}, {"watts": 690.0}, {"clock_mhz": 1400.0}])
    assert (found.busy_ms, found.board) == (2.75, {"clock_mhz": 1300.0, "watts": 690.0})
    assert found.kernels == {"gemm": (3.0, 1.0), "Memset (Device)": (0.25, 0.5)}
    assert of_events([], 1, [{}]).board == {}
    row = {"mode": "paper", "visit": 1, "busy_ms": found.busy_ms, "kernels": found.kernels}
    assert [(one["kernel"], one["ms"], one["launches"]) for one in kernels([row])] == [
        ("gemm", 3.0, 1.0),
        ("Memset (Device)", 0.25, 0.5),
    ]


def test_every_visit_is_compared_with_dense():
    from slope_megatron.bench.bench_model import finish

    rows = [
        {"mode": mode, "tokens_per_second": speed}
        for mode, speed in (("dense", 11.0), ("paper", 18.0), ("paper", 22.0), ("dense", 9.0))
    ]
    assert [row["ratio"] for row in finish(rows)] == [1.0, 2.0, 2.0, 1.0]
    assert [row["ratio"] for row in finish(rows[1:3])] == ["", ""]
