"""`slope bench parallel` on two CPU ranks and a small model: its rows, and the bytes sent beside their formula."""

import sys
from types import SimpleNamespace

import pytest

from slope_megatron.cli import bench


def rows_of(settings):
    """What one rank of the benchmark measures, in groups that are there already."""
    sys.path.insert(0, str(bench.FOLDER))
    import parallel
    from models import Model

    return parallel.measure(parallel.Work(model=Model("tiny", 64, 256, 4, 4, False), **settings))


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


def test_what_is_started():
    module = bench.load("parallel")
    given = {"tokens": 8192, "micro_batches": 4, "vocabulary": 50272, "rounds": 9, "modes": ["dense", "paper"]}
    given["grad_reduce_dtype"] = "fp32"
    given |= {
        "parts": ["tensor", "data"],
        "models": ["opt-13b", "opt-66b"],
        "blocks": 4,
        "data_model": "opt-13b",
        "data_blocks": 2,
    }
    arguments = SimpleNamespace(**given)
    assert {own["grad_reduce_dtype"] for _, own in module.starts(arguments, 4)} == {"fp32"}
    found = [(world, own["model"].name, own["tensor_parallel"]) for world, own in module.starts(arguments, 4)]
    data = [(world, "opt-13b", 1) for world in (1, 2, 4)]
    assert found == [(4, "opt-13b", 4), (4, "opt-66b", 4), *data]
    assert [world for world, _ in module.starts(arguments, 1)] == [1], "one GPU has nobody to share with"


def test_modes_are_those_of_the_configuration():
    assert bench.load("parallel").modes()[:2] == ["dense", "paper"]
