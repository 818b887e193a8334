"""The planner: counts against a real build, memory and time formulas, layouts and their refusals."""

import dataclasses
import math

import pytest

from slope_megatron.config import Config, DataConfig, ModelConfig, ParallelConfig, SlopeConfig
from slope_megatron.launch.cluster import CLUSTERS, read_cluster
from slope_megatron.models.counts import count, model_tensors, stage_tensors
from slope_megatron.planner import memory, plan, speed
from slope_megatron.planner.layout import Layout, layouts
from slope_megatron.planner.memory import GIB, Holding, precision

OPT66B = Config(
    model=ModelConfig(num_layers=64, hidden_size=9216, num_attention_heads=72),
    data=DataConfig(seq_length=2048, global_batch_size=512),
)
SMALL = Config(model=ModelConfig(num_layers=4), data=DataConfig(seq_length=256, global_batch_size=8))
STATED = speed.Rates((), 0.4, 1.3)
KERNELS = Holding(precision("bf16", "fp32"), "kernels", fused=True)


def gib(config, layout, how=KERNELS):
    return math.fsum(memory.fullest_gpu(config, layout, 50272, how).values()) / GIB


def dense(config):
    return dataclasses.replace(config, slope=SlopeConfig(enabled=False))


def test_opt_66b_has_the_published_size():
    elements = sum(tensor.elements() for tensor in model_tensors(dense(OPT66B), 50272))
    assert elements == pytest.approx(65.72e9, rel=1e-3)
    packed = count(model_tensors(OPT66B, 50272), 1)
    assert packed.packed_dense == (64 * 12 - 3) * 9216**2, "all block linears but the first QKV"


def test_shards_and_stages_add_up_to_the_model():
    whole = count(model_tensors(SMALL, 500), 1)
    for pipeline in (1, 2, 4):
        stages = [count(stage_tensors(SMALL, 500, pipeline, stage), 1) for stage in range(pipeline)]
        assert sum(stage.packed for stage in stages) == whole.packed
        # The last stage of several has the tied embedding again.
        again = 768 * 768 if pipeline > 1 else 0
        assert sum(stage.other for stage in stages) == whole.other + again
    halves = count(model_tensors(SMALL, 500), 2)
    assert halves.packed * 2 == whole.packed


def test_blocks_may_differ():
    slope = SlopeConfig(nm_by_block="1=1:4", dense_blocks="3")
    found = count(model_tensors(dataclasses.replace(SMALL, slope=slope), 500), 1)
    square = 768**2
    assert found.packed_dense == (3 * 12 - 3) * square
    assert found.packed == ((12 - 3) + 12) * square // 2 + 12 * square // 4


@pytest.mark.parametrize(("dtype", "fp8"), [("bf16", False), ("fp32", False), ("bf16", True)])
def test_bytes_of_a_sparse_weight(dtype, fp8):
    """DESIGN, section 3: a dense bf16 weight costs 1 + 1.125 + 1.125 + 0.19 bytes, gradients 2, state 6.

    In e4m3 each operand takes half a byte less.
    """
    counts = count(model_tensors(OPT66B, 50272), 1)
    only = dataclasses.replace(counts, other=0, adapters=0)
    sizes = memory.state_bytes(only, precision(dtype, "fp32", fp8), "kernels")
    b = 1 if dtype == "bf16" else 2
    per_weight = {name: size / only.packed_dense for name, size in sizes.items()}
    assert per_weight == {
        "weights": b,
        "patterns": 0.1875,
        "operands": 2 * ((0.5 if fp8 else b) + 0.125),
        "gradients": 2.0,
        "optimizer": 6.0,
    }


@pytest.mark.parametrize("method", ["srste", "sste", "fst"])
def test_bytes_of_a_baseline(method):
    """Stored whole, with a bitmask and a masked copy: nothing is saved, and more is held than by the dense twin."""
    slope = SlopeConfig(method=method)
    counts = count(model_tensors(dataclasses.replace(SMALL, slope=slope), 500), 1)
    # FST and S-STE prune the MLP alone; SR-STE all but the first QKV.
    assert counts.masked == (4 * 12 - 3 if method == "srste" else 4 * 8) * 768**2 and counts.packed == 0
    plain = count(model_tensors(dense(SMALL), 500), 1)
    assert counts.trained == plain.trained
    bytes_of = precision("bf16", "fp32")
    sizes, twin = (memory.state_bytes(found, bytes_of, "kernels") for found in (counts, plain))
    more = {name: sizes[name] - twin[name] for name in sizes if sizes[name] != twin[name]}
    assert more == {"patterns": counts.masked / 8, "operands": 2 * counts.masked}


def test_a_baseline_takes_a_dense_step_and_mode_full_a_faster_one():
    def seconds(**slope):
        config = dataclasses.replace(SMALL, slope=SlopeConfig(**slope))
        cluster, bytes_of = read_cluster("generic-h100"), precision("bf16", "fp32")
        return speed.step_seconds(config, Layout(1, 1, 1), cluster, STATED, 500, bytes_of)

    assert seconds(method="srste") == seconds(enabled=False) > seconds() > seconds(mode="full")


def test_what_opt_66b_needs():
    """The headline: 2:4 fits 8 nodes of Narval at TP 4 x PP 8 and of Lonestar 6 at TP 3 x PP 8, dense does not."""
    narval = Layout(4, 8, 1, recompute="full", sequence_parallel=True)
    lonestar = Layout(3, 8, 1, recompute="full")
    for layout in (narval, lonestar):
        assert gib(OPT66B, layout) <= 38.5 < gib(dense(OPT66B), layout)
    assert gib(OPT66B, narval) == pytest.approx(26.8, abs=0.1)
    assert gib(OPT66B, dataclasses.replace(narval, recompute="none")) == pytest.approx(34.3, abs=0.1)
    unfused = dataclasses.replace(KERNELS, fused=False)
    assert gib(OPT66B, lonestar, unfused) > 38.5, "AdamW's temporaries are what is too much there"


def test_memory_falls_with_every_cut():
    base = gib(OPT66B, Layout(1, 1, 32))
    for layout in (Layout(2, 1, 16), Layout(1, 2, 16), Layout(1, 1, 32, zero=2), Layout(1, 1, 32, zero=3)):
        assert gib(OPT66B, layout) < base
    assert gib(OPT66B, Layout(1, 1, 32, recompute="full")) < base
    assert gib(OPT66B, Layout(1, 1, 32), dataclasses.replace(KERNELS, offload=True)) < base


def test_zero_3_gathers_no_more_blocks_than_there_are():
    one = dataclasses.replace(SMALL, model=ModelConfig(num_layers=1))
    resident, gathered = (memory.gpu_bytes(one, Layout(1, 1, 2, zero=zero), 50272, KERNELS, 0) for zero in (1, 3))
    assert gathered["operands"] == resident["operands"]
    assert gathered["weights"] == resident["weights"] * (1 + 1 / 2)
    kept = dataclasses.replace(SMALL, parallel=ParallelConfig(zero_stage=3, zero3_resident_operands=True))
    whole, resident = (memory.gpu_bytes(kept, Layout(1, 1, 2, zero=zero), 50272, KERNELS, 0) for zero in (1, 3))
    assert resident["operands"] == whole["operands"], "asked for, they stay"


def test_bubble():
    assert speed.bubble(Layout(1, 8, 1), 64) == pytest.approx(7 / 71)
    assert speed.bubble(Layout(4, 1, 1), 64) == 0.0


def test_time_follows_the_stated_mfu():
    """One GPU, no cut: 6 operations a parameter and token, and attention, at MFU x peak."""
    cluster = read_cluster("generic-h100")
    config = dense(SMALL)
    seconds = speed.step_seconds(config, Layout(1, 1, 1), cluster, STATED, 500, precision("bf16", "fp32"))
    tokens = 8 * 256
    matrices = 4 * 12 * 768 * 768 + 768 * 768
    attention = 6 * tokens * 256 * 768 * 4
    assert seconds == pytest.approx((6 * tokens * matrices + attention) / (0.4 * 989e12), rel=1e-3)
    sparse = speed.step_seconds(SMALL, Layout(1, 1, 1), cluster, STATED, 500, precision("bf16", "fp32"))
    assert sparse < seconds


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_replicas_send_each_other_takes_time(zero):
    """Two nodes' replicas at ZeRO 1, 2 and 3; gradients in the type that they travel in."""
    cluster, micro_batches, replicas = read_cluster("narval"), 4, 8
    config = dataclasses.replace(dense(SMALL), data=DataConfig(seq_length=256, global_batch_size=32))
    layout = Layout(1, 1, replicas, zero=zero)
    seconds = {}
    for reduced in ("bf16", "auto", "fp32"):
        own = dataclasses.replace(config, parallel=ParallelConfig(grad_reduce_dtype=reduced))
        seconds[reduced] = speed.step_seconds(own, layout, cluster, STATED, 500, precision("bf16", "fp32"))
    elements = count(model_tensors(config, 500), 1).trained
    link = cluster.network_gbs * 1e9 / cluster.gpus_per_node
    times = {1: 1, 2: 2 * micro_batches, 3: micro_batches}[zero]
    more = (4 - 2) * times * elements * (replicas - 1) / replicas / link
    assert seconds["fp32"] - seconds["bf16"] == pytest.approx(more)
    assert seconds["auto"] == seconds["fp32" if zero == 1 else "bf16"]


def test_measured_rates_are_read_and_the_faster_product_counts(tmp_path):
    path = tmp_path / "gemm.csv"
    header = "model,tp,linear,kind,rows,columns,tokens,dense_ms,sparse_ms"
    path.write_text(f"# gpu\n{header}\nm,1,fc1,forward,1000,500,1000,1.0,0.5\nm,1,fc1,dgrad,500,1000,1000,1.0,2.0\n")
    rates = speed.Rates(speed.read_rates(path), 0.4, 1.3)
    operations = 2.0 * 1000 * 1000 * 500
    assert rates.seconds("dense", "forward", 1000, 1000, 500, 1) == pytest.approx(1e-3)
    assert rates.seconds("sparse", "forward", 1000, 1000, 500, 1) == pytest.approx(0.5e-3)
    assert rates.seconds("sparse", "dgrad", 1000, 1000, 500, 1) == pytest.approx(1e-3), "dense is always a candidate"
    assert rates.seconds("dense", "wgrad", 2000, 1000, 500, 1) == pytest.approx(2 * operations / 1e12)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns columns, dense_ms, kind"):
        speed.read_rates(path)


def test_every_possible_layout_is_a_partition_and_the_rest_has_a_reason():
    found = list(layouts(OPT66B, 32, 4))
    assert all(layout.gpus == 32 for layout, _ in found)
    assert {layout.tensor for layout, reason in found if reason is None} == {1, 2, 4}
    reasons = {layout.tensor: reason for layout, reason in found if layout.tensor == 8}
    assert "TP 8 must divide the 4 GPUs of a node" in reasons[8]
    three = dict(layouts(OPT66B, 24, 3))
    assert three[Layout(3, 8, 1)] is None
    assert "PP 24 must divide the 64 layers" in three[Layout(1, 24, 1)]
    assert not Layout(3, 8, 1).sequence_parallel, "3 ranks cannot share 2048 tokens out"


def test_pipeline_means_zero_1():
    assert all(layout.zero == 1 for layout, _ in layouts(OPT66B, 32, 4) if layout.pipeline > 1)


def test_what_pretrain_cannot_run_is_said():
    known = {field.name for field in dataclasses.fields(ParallelConfig)}
    reason = Layout(1, 1, 4, zero=3).not_trainable()
    assert (reason is None) == ("zero_stage" in known)
    assert Layout(2, 1, 2).not_trainable() is None


def test_the_recommendation_is_the_fastest_that_fits():
    question = plan.Question(OPT66B, 50272, read_cluster("narval"), STATED)
    rows = plan.rows(question, 8)
    best, why = plan.recommend(rows, "sparse", "2:4")
    assert best.fits and (best.layout.tensor, best.layout.pipeline) == (4, 8)
    assert "possible layouts" in why
    with pytest.raises(ValueError, match=r"the dense model fits none of \d+ layouts: the least is .* GiB a GPU"):
        plan.recommend(rows, "dense", "dense")
    assert plan.nodes_needed(question, "sparse")[0] < plan.nodes_needed(question, "dense")[0]


def test_mist_counts_dense_operands():
    """No 2:4 units: the reference backend holds two dense copies and an index."""
    question = plan.Question(OPT66B, 50272, read_cluster("mist"), STATED)
    assert question.holding.backend == "reference" and question.dtype == "fp16"


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.env")), ids=lambda path: path.stem)
def test_every_cluster_file_is_complete(path):
    cluster = read_cluster(path.stem)
    assert cluster.gpus_per_node >= 1 and cluster.tested


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("GPUS=4", "unknown key GPUS"),
        ("GPUS_PER_NODE=four", "GPUS_PER_NODE is 'four': it must be of type int"),
        ("SPARSE_24=maybe", "SPARSE_24 is 'maybe': it must be yes or no"),
        ("LAUNCHER=ssh", "LAUNCHER is 'ssh': it must be one of srun"),
        ("SBATCH_ARGS=--a --b", "quote values that hold spaces"),
        ("export GPU=A100", "is no KEY=value"),
    ],
)
def test_a_wrong_cluster_file_is_refused(tmp_path, line, message):
    path = tmp_path / "here.env"
    path.write_text((CLUSTERS / "narval.env").read_text() + line + "\n")
    with pytest.raises(ValueError) as error:
        read_cluster(str(path))
    assert message in str(error.value)


def test_an_unknown_cluster_names_the_known_ones():
    with pytest.raises(ValueError, match=r"cluster 'narwal' has no file .*use one of .*narval"):
        read_cluster("narwal")


def test_mode_full_counts_the_pruned_wgrad_at_its_measured_rate():
    """dY^T `[out, T]` is the 2:4 matrix there, and T what is summed over; where it is no faster, wgrad stays dense."""
    cluster = read_cluster("generic-h100")
    tokens, out, width = 8192, 2048, 1024
    operations = 2.0 * tokens * out * width

    def wgrad(sparse_tflops):
        measured = [speed.Rate("dense", "forward", tokens, out, width, 500.0)]
        measured += [speed.Rate("sparse", "forward", width, out, tokens, sparse_tflops)]
        rates = speed.Rates(tuple(measured), 0.4, 1.3)
        return speed.linear_seconds(rates, cluster, True, True, ("wgrad",), tokens, (out, width), 2)

    pruning = tokens * out * 3.125 / (cluster.memory_gbs * 1e9)
    assert wgrad(900.0) == pytest.approx(operations / 900e12 + pruning)
    assert wgrad(400.0) == pytest.approx(operations / 500e12)
    # A wgrad that was measured itself holds its pruning.
    own = [speed.Rate("sparse", "wgrad", tokens, out, width, 600.0), speed.Rate("dense", "wgrad", 1, 1, 1, 450.0)]
    rates = speed.Rates(tuple(own), 0.4, 1.3)
    for full, tflops in ((True, 600e12), (False, 450e12)):
        seconds = speed.linear_seconds(rates, cluster, True, full, ("wgrad",), tokens, (out, width), 2)
        assert seconds == pytest.approx(operations / tflops)
