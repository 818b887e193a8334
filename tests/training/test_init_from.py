"""A run that starts from a packed one has its weights and patterns to the bit, at any layout."""

import dataclasses
from pathlib import Path

import pytest
import torch

from helpers.models import VOCABULARY, build_engine, save, small_config, step_batches


def with_run(config, out, **train):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, out=str(out), **train))


def shards_of(model):
    from slope_megatron.models.canonical import shards

    return [(shard.name, shard.offset, shard.shape, shard.data.detach().clone()) for shard in shards(model)]


def begin(config, steps):
    """Train and save; this rank's tensors."""
    from megatron.core import parallel_state

    engine = build_engine(config, torch.float32)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for step in range(steps):
        engine.train_step(step_batches(config, step, replica, replicas))
    save(engine, Path(config.train.out))
    return shards_of(engine.model)


def start_from(config):
    """A new run's tensors before its first step, whether its operands follow them, and a step."""
    from megatron.core import parallel_state

    from slope_megatron.models.provider import build_model
    from slope_megatron.training.checkpoint.init_from import check_init, load_init
    from slope_megatron.training.engine import Engine

    check_init(config, samples=8)
    model = build_model(config, VOCABULARY, torch.float32)
    load_init(model, config, VOCABULARY, dataset=None)
    parts = shards_of(model)
    engine = Engine(model, config, torch.float32)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    first = engine.train_step(step_batches(config, 0, replica, replicas))
    return parts, first.loss


def whole(results):
    tensors = {}
    for parts in results:
        for name, offset, shape, data in parts:
            target = tensors.setdefault(name, torch.full(shape, -1, dtype=data.dtype))
            target[tuple(slice(at, at + size) for at, size in zip(offset, data.shape, strict=True))] = data
    return tensors


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_weights_and_patterns_to_the_bit(ranks, tmp_path, before, after):
    first = with_run(small_config(tensor_parallel=before), tmp_path / "one")
    first = dataclasses.replace(first, slope=dataclasses.replace(first.slope, adapter_rank=0, backward_mask_interval=2))
    saved = whole(ranks.run(begin, first, 4, world=before, tensor_parallel=before))
    second = with_run(small_config(tensor_parallel=after), tmp_path / "two", init_from=str(tmp_path / "one"), seed=99)
    second = dataclasses.replace(second, slope=dataclasses.replace(second.slope, adapter_rank=4, lazy_fraction=0.5))
    results = ranks.run(start_from, second, world=after, tensor_parallel=after)
    found = whole([parts for parts, _ in results])
    adapters = {name for name in found if ".adapter_" in name}
    assert adapters and set(found) - adapters == set(saved)
    assert any(name.endswith("weight_column") for name in saved)
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name
    assert all((tensor == 0).all() == name.endswith("adapter_r") for name, tensor in found.items() if name in adapters)


def with_adapters(config, **slope):
    return dataclasses.replace(config, slope=dataclasses.replace(config.slope, **slope))


@pytest.mark.parametrize("rank", [0, 8])
def test_adapters_that_had_not_joined_are_no_matter(ranks, tmp_path, rank):
    first = with_adapters(with_run(small_config(), tmp_path / "one"), adapter_rank=4, lazy_fraction=0.5)
    saved = whole([ranks.run(begin, first, 3, world=1)[0]])
    second = with_adapters(with_run(first, tmp_path / "two", init_from=str(tmp_path / "one")), adapter_rank=rank)
    parts, _ = ranks.run(start_from, second, world=1)[0]
    found = whole([parts])
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items() if ".adapter_" not in name)
    assert {tensor.shape[0] for name, tensor in found.items() if name.endswith("adapter_l")} == ({rank} - {0})


def begin_from(config):
    """What `--init-from X --stop-at 0` saves."""
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.checkpoint.init_from import load_init
    from slope_megatron.training.engine import Engine

    model = build_model(config, VOCABULARY, torch.float32)
    load_init(model, config, VOCABULARY, dataset=None)
    save(Engine(model, config, torch.float32), Path(config.train.out))


def test_joined_adapters_are_part_of_a_run_that_begins_with_them(ranks, tmp_path):
    """Also before its first step: exported, or handed on to a third run."""
    from slope_megatron.export.trained_run import TrainedRun
    from slope_megatron.training.checkpoint.init_from import check_init

    plain = small_config()
    plain = dataclasses.replace(plain, model=dataclasses.replace(plain.model, vocab_size=VOCABULARY))
    first = with_adapters(with_run(plain, tmp_path / "one"), adapter_rank=4, lazy_fraction=0.5)
    ranks.run(begin, first, 8, world=1)
    second = with_run(first, tmp_path / "two", init_from=str(tmp_path / "one"))
    second = with_adapters(second, lazy_fraction=1.0)
    ranks.run(begin_from, second, world=1)
    before, after = TrainedRun(tmp_path / "one"), TrainedRun(tmp_path / "two")
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert not torch.equal(before.dense(name, fold=True), before.dense(name, fold=False))
    assert torch.equal(after.dense(name, fold=True), before.dense(name, fold=True))
    third = with_run(second, tmp_path / "three", init_from=str(tmp_path / "two"))
    check_init(third, samples=8)
    with pytest.raises(ValueError, match="have joined its model"):
        check_init(with_adapters(third, lazy_fraction=0.5), samples=8)


def refusal_of_load(config):
    """The tensors are compared by whoever reads them, and not before."""
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.checkpoint.init_from import load_init

    model = build_model(config, VOCABULARY, torch.float32)
    try:
        load_init(model, config, VOCABULARY, None)
    except ValueError as error:
        return str(error)


def test_what_does_not_fit_is_refused(ranks, tmp_path):
    first = with_run(small_config(), tmp_path / "one", steps=4)
    first = dataclasses.replace(first, slope=dataclasses.replace(first.slope, adapter_rank=4, lazy_fraction=0.5))
    ranks.run(begin, first, 3, world=1)
    second = with_run(first, tmp_path / "two", init_from=str(tmp_path / "one"))

    def changed(section, **values):
        return dataclasses.replace(second, **{section: dataclasses.replace(getattr(second, section), **values)})

    from slope_megatron.training.checkpoint.init_from import check_init

    check_init(changed("slope", lazy_fraction=1.0), samples=8)
    longer = second.data.seq_length * 2
    for config, message in (
        (
            changed("slope", dense_start=0.5, adapter_rank=0).form_at(0),
            "holds a packed model and this run's first weights are dense: leave --no-slope, --slope-method or "
            "--slope-dense-start out",
        ),
        (changed("slope", nm="1:4"), "is of another model .slope.nm: '2:4' there, '1:4' here.: give the same settings"),
        (changed("model", num_layers=4), "model.num_layers: 2 there, 4 here"),
        (changed("data", seq_length=longer), rf"sequence length.: {longer // 2} there, {longer} here"),
        (second, r"have joined its model: go on with them .*--slope-adapter-rank 4 --slope-lazy-fraction 1.0"),
        (first, "--init-from is unset: name the checkpoint to start from"),
        (with_run(second, "x", init_from=str(tmp_path)), "holds no Megatron checkpoint of the torch_dist format"),
    ):
        with pytest.raises(ValueError, match=message):
            check_init(config, samples=8)
    (weights,) = (tmp_path / "one" / "checkpoints" / "step_00000003").glob("*0_0.distcp")
    whole, fits = weights.read_bytes(), changed("slope", lazy_fraction=1.0)
    weights.write_bytes(bytes(byte ^ 1 for byte in whole))
    check_init(fits, samples=8)
    assert "has another checksum in the" in ranks.run(refusal_of_load, fits, world=1)[0]
    weights.write_bytes(whole)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is corrupt: its file .* has \d+ bytes instead of"):
        check_init(changed("slope", lazy_fraction=1.0), samples=8)


def test_trained_weights_are_pruned_at_random_only_by_name(ranks, tmp_path, caplog):
    """The default is refused, a file's word is warned of, a flag's is taken; packed weights are not pruned at all."""
    from slope_megatron.training.checkpoint.init_from import check_init

    dense = with_run(small_config(slope={"enabled": False}), tmp_path / "dense")
    ranks.run(begin, dense, 1, world=1)
    config = with_run(small_config(), tmp_path / "two", init_from=str(tmp_path / "dense"))
    with pytest.raises(ValueError, match=r"holds trained dense weights .* give --slope-pattern magnitude \(or wanda\)"):
        check_init(config, 8, origins={})
    assert not caplog.records
    check_init(config, 8, origins={"slope.pattern": "recipe.yaml"})
    assert "recipe.yaml asks for --slope-pattern random: the trained dense weights" in caplog.text
    caplog.clear()
    check_init(config, 8, origins={"slope.pattern": "flag"})
    check_init(with_adapters(config, pattern="magnitude"), 8, origins={})
    check_init(with_adapters(config, enabled=False), 8, origins={})
    packed = with_run(small_config(), tmp_path / "packed")
    ranks.run(begin, packed, 1, world=1)
    check_init(with_run(config, tmp_path / "three", init_from=str(tmp_path / "packed")), 8, origins={})
    assert not caplog.records
