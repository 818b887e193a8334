"""A dense start and a dense tail: against plain torch through the switches, at other layouts, and resumed."""

import dataclasses

import pytest
import torch

from helpers.models import build_engine, go_on, small_config
from helpers.numerics import relative_error
from helpers.plain_baselines import plain_training
from helpers.plain_phases import plain_phases
from helpers.zero_runs import assemble, canonical_state

STEPS = 8
# A seed at which no rounding turns a ReLU (one does at 1234, for 3e-5 of the norm).
# The second pruning is chosen anew within the sparse steps, and no step of it is a switch.
PHASES = {
    "start": {"dense_start": 0.375},
    "tail": {"dense_tail": 0.375},
    "both": {"dense_start": 0.25, "dense_tail": 0.25},
}
FAMILIES = {"opt": {}, "llama": {"gated": True}}


def config_of(phase, *, family="opt", zero_stage=1, slope=None, **more):
    slope = {"backward_mask_interval": 3, **PHASES[phase], **(slope or {})}
    config = small_config(slope=slope, steps=STEPS, keep_checkpoints=9, seed=2, **FAMILIES[family], **more)
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, zero_stage=zero_stage))


def resumed(config, run, step, dtype=torch.float32):
    """The engine that goes on from a checkpoint, whatever its form; garbage before."""
    from slope_megatron.training.checkpoint import store

    engine = build_engine(config, dtype, first_step=step)
    with torch.no_grad():
        for tensor in (*engine.model.parameters(), *engine.model.buffers()):
            tensor.fill_(7)
    folder = store.folder_of(run, step)
    store.check_state(folder, config)
    store.load(engine, folder)
    return engine


def train(config, run, dtype=torch.float32, begin=0, save_at=()):
    """Losses and norms through all switches, the final state of this rank, and the forms that trained."""
    engine = resumed(config, run, begin, dtype) if begin else build_engine(config, dtype)
    results, forms = [], [engine.form]
    run = run / f"from_{begin}"
    for end in [*(step for step in config.switches if step > begin), STEPS]:
        results += go_on(engine, end, {*save_at, end}, run)
        if end < STEPS:
            engine = resumed(config, run, end, dtype)
            forms.append(engine.form)
    return results, canonical_state(engine), forms


def pruned_tensors(config, results):
    """Dense matrices of weights and moments, layer by layer; of a state that ends packed, unpacked."""
    from slope_megatron.sparsity.packing import unpack, unpack_bits

    whole, found = assemble([state for _, state, _ in results]), []
    for block in range(config.model.num_layers):
        # Of block 0, QKV is dense; of FST and S-STE, the attention.
        attention = [*(["linear_qkv"] if block else []), "linear_proj"] if config.slope.prunes_attention else []
        names = [f"self_attention.{name}" for name in attention] + ["mlp.linear_fc1", "mlp.linear_fc2"]
        for name in (f"decoder.layers.{block}.{name}.weight" for name in names):
            tensors = {kind: whole[f"optimizer.{kind}.{name}"] for kind in ("fp32", "exp_avg", "exp_avg_sq")}
            if f"{name}_pattern" in whole:
                mask = unpack_bits(whole[f"{name}_pattern"])
                tensors = {kind: unpack(values, mask) for kind, values in tensors.items()}
            found.append({"weight": tensors.pop("fp32"), **tensors})
    return found


FORMS = {"start": ["dense", "sparse"], "tail": ["sparse", "dense"], "both": ["dense", "sparse", "dense"]}


@pytest.mark.parametrize("phase", PHASES)
def test_the_switches_are_a_few_lines_of_torch(ranks, tmp_path, phase):
    config = config_of(phase)
    expected, matrices = ranks.run(plain_phases, config, world=1)[0]
    results = ranks.run(train, config, tmp_path, world=1)
    steps, _, forms = results[0]
    assert forms == FORMS[phase]
    assert steps == [pytest.approx(pair, rel=1e-5) for pair in expected]
    found = pruned_tensors(config, results)
    assert len(found) == len(matrices) == 7
    for tensors, plain in zip(found, matrices, strict=True):
        for kind, tensor in tensors.items():
            # Rounding alone: of fp32, in another order of sums.
            assert relative_error(tensor, plain[kind]) < 1e-5, kind


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("method", ["srste", "sste", "fst"])
def test_a_baseline_is_too(ranks, tmp_path, method, phase):
    """Its weights are dense throughout: all that changes is the mask, and S-STE's scale is that of its start."""
    slope = {"method": method, "fst_mask_interval": 3, "srste_decay": 0.05, "fst_decay": 0.05}
    # FST's own tail is tested by its own name.
    slope |= {"fst_dense_tail": PHASES[phase].get("dense_tail", 0.0), "dense_tail": None} if method == "fst" else {}
    config = config_of(phase, slope=slope)
    expected, weights, masks = ranks.run(plain_training, config, world=1)[0]
    results = ranks.run(train, config, tmp_path, world=1)
    steps, _, forms = results[0]
    assert forms == FORMS[phase]
    assert steps == [pytest.approx(pair, rel=1e-5) for pair in expected]
    assert float(masks[0].float().mean()) == (1.0 if forms[-1] == "dense" else 0.5)
    found = pruned_tensors(config, results)
    assert len(found) == len(weights) == (7 if method == "srste" else 4)
    for tensors, weight in zip(found, weights, strict=True):
        assert relative_error(tensors["weight"], weight) < 1e-4


LAYOUTS = {
    "TP2": (2, {"tensor_parallel": 2, "sequence_parallel": True}, {}),
    "DP2": (2, {}, {"zero_stage": 1}),
    "DP2-ZeRO2": (2, {}, {"zero_stage": 2}),
    "DP2-ZeRO3": (2, {}, {"zero_stage": 3}),
    "PP2": (2, {"pipeline_parallel": 2}, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", [pytest.param("opt", marks=pytest.mark.slow), "llama"])
def test_layouts_are_equal(ranks, tmp_path, family, layout):
    """Gate and up of LLaMA lie above each other in each shard; ZeRO cuts masters and moments in the middle of rows."""
    world, sizes, more = LAYOUTS[layout]
    one = config_of("both", family=family)
    expected = ranks.run(train, one, tmp_path / "one", world=1)
    config = config_of("both", family=family, **sizes, **more)
    groups = {name: size for name, size in sizes.items() if name != "sequence_parallel"}
    results = ranks.run(train, config, tmp_path / "more", world=world, **groups)
    for steps, _, forms in results:
        assert forms == FORMS["both"]
        assert steps == [pytest.approx(pair, rel=1e-4) for pair in expected[0][0]]
    for tensors, others in zip(pruned_tensors(config, results), pruned_tensors(one, expected), strict=True):
        for kind, tensor in tensors.items():
            assert relative_error(tensor, others[kind]) < 1e-3, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", [{}, {"mode": "full"}, {"method": "srste"}], ids=["paper", "full", "srste"])
def test_resume_is_exact_around_the_switches(ranks, tmp_path, method, dtype):
    """From a step before, at and after each: the checkpoint says which form it has."""
    config = config_of("both", slope=method)
    assert config.switches == [2, 6]
    expected = ranks.run(train, config, tmp_path, dtype, 0, (1, 3, 5, 7), world=2)
    for begin in (1, 2, 3, 5, 6, 7):
        found = ranks.run(train, config, tmp_path / "from_0", dtype, begin, world=2)
        for (steps, (parts, counts), _), (all_steps, (all_parts, all_counts), _) in zip(found, expected, strict=True):
            assert steps == all_steps[begin:]
            assert counts == all_counts
            for (name, *_, tensor), (*_, expected_tensor) in zip(parts, all_parts, strict=True):
                assert torch.equal(tensor, expected_tensor), name
