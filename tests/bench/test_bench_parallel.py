"""`slope bench parallel` on two CPU ranks and a small model: its rows, and the bytes sent beside their formula."""

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slope_megatron import cli
from slope_megatron.cli import bench

ROOT = Path(__file__).resolve().parents[2]
TINY = "--sequence 32 --tokens 64 --micro-batches 1 --vocabulary 100 --blocks 1 --data-blocks 1".split()


def rows_of(settings):
    """What one rank of the benchmark measures, in groups that are there already."""
    from slope_megatron.bench import parallel
    from slope_megatron.bench.models import TINY

    return parallel.measure(parallel.Work(model=TINY, **settings))


def settings(tensor_parallel, **more):
    common = {"modes": ("dense", "paper"), "tensor_parallel": tensor_parallel, "blocks": 2}
    sizes = {"tokens": 512, "sequence": 32, "micro_batches": 2, "vocabulary": 100, "rounds": 2}
    return {**common, **sizes, "waiting": True, "folder": "", **more}


def test_what_tensor_parallel_ranks_send_is_the_formula(ranks):
    rows = ranks.run(rows_of, settings(2), world=2, tensor_parallel=2)[0]
    assert [(row["mode"], row["overlap"]) for row in rows] == [("dense", True), ("paper", True), ("paper", False)]
    for row in rows:
        # Beyond the formula: gradients of norms, biases and positions, and a loss a token.
        assert row["tensor_sent_gib"] == pytest.approx(row["tensor_formula_gib"], rel=0.03)
        assert row["data_sent_gib"] == row["data_formula_gib"] == 0.0


@pytest.mark.parametrize(("reduced", "gradient"), [("bf16", 2), ("auto", 4)])
def test_replicas_send_packed_gradients(ranks, reduced, gradient):
    dense, packed = ranks.run(rows_of, settings(1, grad_reduce_dtype=reduced), world=2)[0]
    for row in (dense, packed):
        # Beyond the formula: the padding of ZeRO's partitions, and losses.
        assert row["data_sent_gib"] == pytest.approx(row["data_formula_gib"], rel=0.01)
    # 2 blocks x 12 x 64^2 weights, half of them kept; each is sent as a gradient, reduce-scattered, and a bf16 weight.
    saved = (dense["data_sent_gib"] - packed["data_sent_gib"]) * 2**30
    assert saved == pytest.approx(12 * 64 * 64 * (gradient + 2) / 2, rel=0.01)


def samples(*steps):
    return [{"step": step, "forward_backward": 1.0, "reduce": 1.0, "update": 1.0} for step in steps]


def test_rows_are_compared_with_the_dense_one_of_their_layout_and_with_one_gpu():
    module = bench.load("parallel")
    common = {"model": "m", "overlap": True, "tensor_parallel": 1, "tokens": 10, "micro_batches": 1, "blocks": 1}
    rows = [
        {**common, "mode": mode, "data_parallel": replicas, "samples": samples(*times)}
        for mode, replicas, times in (
            ("dense", 1, (4.0, 4.0, 4.0)),
            ("paper", 1, (2.0, 2.0, 4.0)),
            ("dense", 2, (5.0, 5.0, 5.0)),
            ("paper", 2, (2.5, 2.5, 2.5)),
        )
    ]
    done = module.finish(rows)
    assert [row["ratio"] for row in done] == [1.0, 2.0, 1.0, 2.0]
    assert [row["efficiency"] for row in done] == [1.0, 1.0, 0.8, 0.8]
    assert done[3]["tokens_per_second"] == 8000.0 and done[1]["step_ms"] == 2.0


def test_ranks_that_share_gpus_have_no_times():
    module = bench.load("parallel")
    (row,) = module.untimed([{"model": "m", "state_gib": 1.23456, "samples": samples(4.0, 4.0)}])
    assert row == {"model": "m", "state_gib": 1.235}
    shared = module.starts(parsed(module, "--share-gpus", "4", "--parts", "tensor"), 4)
    assert [(start.world, start.settings["waiting"]) for start in shared] == [(4, False)] * 3


def parsed(module, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


def test_what_is_started():
    module = bench.load("parallel")
    words = "--models opt-13b opt-66b --modes paper dense --grad-reduce-dtype bf16"
    arguments = parsed(module, *words.split())
    found = module.starts(arguments, 4)
    tensor = ["opt-13b, 4 ranks at TP 4", "opt-66b, 4 ranks at TP 4"]
    assert list(map(str, found)) == [*tensor, *(f"opt-13b, {world} ranks at TP 1" for world in (1, 2, 4))]
    assert {start.settings["grad_reduce_dtype"] for start in found} == {"bf16"}
    assert found[0].settings["modes"] == ("dense", "paper"), "dense first: the others are compared with it"
    assert [start.world for start in module.starts(arguments, 1)] == [1], "one GPU has nobody to share with"
    on_cpu = module.starts(parsed(module, "--cpu-ranks", "2"), 2)
    assert [start.settings["model"].name for start in on_cpu] == ["tiny"] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--modes paper --cpu-ranks 2", "--modes is paper: dense must be among them"),
        ("--rounds 1 --cpu-ranks 2", "--rounds is 1: a spread needs 2"),
        ("--share-gpus 4 --gpus 2", "--gpus is 2 and --share-gpus is 4: give one of them"),
        ("--gpus 2 --cpu-ranks 2", "--gpus is 2 and --cpu-ranks is 2: give one of them"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message):
    arguments = cli.parse(["bench", "parallel", *words.split()])
    with pytest.raises(ValueError, match=message):
        arguments.run(arguments)


def test_rounds_end_with_the_budget_but_not_before_there_are_rows(ranks):
    spent = settings(1, seconds=0.0, started=0.0, rounds=9, modes=("dense", "paper"))
    (rows,) = ranks.run(rows_of, spent, world=1)
    assert [(row["mode"], len(row["samples"])) for row in rows] == [("dense", 3)]


def test_rows_are_kept_after_each_round(ranks):
    kept, rows = ranks.run(kept_rows_of, settings(1, rounds=4, waiting=False), world=1)[0]
    assert kept == [(2, 3), (2, 4)] and len(rows) == 2


def kept_rows_of(settings):
    from slope_megatron.bench import parallel
    from slope_megatron.bench.models import TINY

    kept = []
    work = parallel.Work(model=TINY, **settings)
    rows = parallel.measure(work, lambda rows: kept.append((len(rows), len(rows[0]["samples"]))))
    return kept, rows


def command(folder, *words):
    """`slope bench parallel` on two CPU ranks, as a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    line = [sys.executable, "-m", "slope_megatron", "bench", "parallel", "--cpu-ranks", "2", *TINY]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([*line, "--out", str(folder), *words], env=environment, **pipes)


def test_a_failed_start_costs_its_own_rows_alone(tmp_path, monkeypatch, capsys):
    module = bench.load("parallel")
    common = {"model": "tiny", "mode": "dense", "overlap": True, "tensor_parallel": 1, "blocks": 1, "micro_batches": 1}
    sizes = ("state", "peak", "planned", "tensor_sent", "tensor_formula", "data_sent", "data_formula")
    common |= {"tokens": 64, "samples": samples(1.0, 2.0, 3.0), **{f"{name}_gib": 0.0 for name in sizes}}

    def played(world, work, keep):
        if world == 2:
            raise module.ProcessException("rank 1 ran out of memory", 1, 1)
        keep([{**common, "data_parallel": world}])

    monkeypatch.setattr(module, "run_ranks", played)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ("--cpu-ranks", "4", "--parts", "data", "--modes", "dense", "--out", str(tmp_path))
    assert module.main(parsed(module, *words)) == 1
    assert [row["data_parallel"] for row in rows_in(tmp_path / "parallel.csv")[1]] == ["1", "4"]
    seen = capsys.readouterr()
    assert "failed: tiny, 2 ranks at TP 1" in seen.out and "rank 1 ran out of memory" in seen.err


def test_ranks_that_hang_past_the_budget_say_where(tmp_path):
    hung = """
import sys, time, types
from slope_megatron.bench import ranks
from slope_megatron.bench.work import Work
from slope_megatron.bench.models import TINY
ranks.GRACE = 0
def stuck_in_a_collective(work):
    time.sleep(3600)
sys.modules["slope_megatron.bench.parallel"] = types.SimpleNamespace(play=stuck_in_a_collective)
ranks.play_rank(0, 1, 0, Work(TINY, ("dense",), 1, 1, 64, 32, 1, 100, 3, False, "", seconds=0.0, started=0.0))
"""
    found = subprocess.run([sys.executable, "-c", hung], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 1 and "in stuck_in_a_collective" in found.stderr


def rows_in(path):
    with path.open() as file:
        note = file.readline()
        return note, list(csv.DictReader(file))


@pytest.mark.slow
def test_the_whole_command_on_cpu_ranks(tmp_path):
    process = command(tmp_path, "--rounds", "3", "--modes", "dense", "paper")
    out, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    note, rows = rows_in(tmp_path / "parallel.csv")
    assert "these times say nothing" in note and out.splitlines()[-1].endswith("these times say nothing")
    layouts = [(row["tensor_parallel"], row["data_parallel"], row["mode"], row["overlap"]) for row in rows]
    tensor = [("2", "1", "dense", "True"), ("2", "1", "paper", "True"), ("2", "1", "paper", "False")]
    assert layouts == [*tensor, *(("1", world, mode, "True") for world in "12" for mode in ("dense", "paper"))]
    for row in rows:
        assert float(row["step_ms"]) > 0 and float(row["planned_gib"]) > 0 and row["rounds"] == "3"
        assert float(row["tensor_sent_gib"]) == pytest.approx(float(row["tensor_formula_gib"]), rel=0.15)
    assert (tmp_path / "parallel.png").read_bytes().startswith(b"\x89PNG")
    for phase in ("the ranks meet", "dense: engine", "paper: first step", "round 3 of 3: 3 engines"):
        assert phase in said


@pytest.mark.slow
def test_a_stopped_command_leaves_the_rows_it_has(tmp_path):
    process = command(tmp_path, "--rounds", "100000", "--parts", "data", "--modes", "dense", "paper")
    try:
        path, end = tmp_path / "parallel.csv", time.monotonic() + 300
        while not path.is_file() and time.monotonic() < end:
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    _, rows = rows_in(path)
    assert [row["mode"] for row in rows] == ["dense", "paper"] and int(rows[0]["rounds"]) >= 3


@pytest.mark.slow
def test_starts_after_the_budget_are_named(tmp_path):
    process = command(tmp_path, "--rounds", "100000", "--seconds", "10", "--modes", "dense", "--parts", "data")
    _, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    assert "--seconds are over: " in said and "rounds of 100000" in said
    assert "the 10 s of --seconds are over: not measured: tiny, 2 ranks at TP 1" in said
    assert [row["data_parallel"] for row in rows_in(tmp_path / "parallel.csv")[1]] == ["1"]


def test_modes_are_those_of_the_configuration():
    assert bench.load("parallel").modes()[:2] == ["dense", "paper"]
