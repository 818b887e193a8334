"""Wanda on a whole model: against whole forward passes for every block, and at TP 2."""

import dataclasses

import pytest
import torch

from helpers.models import VOCABULARY, sample, small_config

SAMPLES = 5


def calibrate(config):
    """This rank's masks and weights after pruning, and the packed model's, which is loaded with them."""
    from slope_megatron.models.dense import load_dense
    from slope_megatron.models.layer_spec import sparse_modules
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.wanda import calibrated_masks

    weights = dense_weights(config)
    masks = calibrated_masks(config, VOCABULARY, torch.float64, weights, [sample(index) for index in range(SAMPLES)])
    packed = build_model(config, VOCABULARY, torch.float64)
    load_dense(packed, config, weights, masks=masks)
    names = {id(module): name for name, module in packed.named_modules()}
    for module in sparse_modules(packed):
        name = f"{names[id(module)]}.weight"
        assert torch.equal(module.row_pattern(), masks.pop(name)), name
    assert not masks
    return {names[id(module)]: module.dense_weight() for module in sparse_modules(packed)}


def dense_weights(config):
    """A dense model's whole tensors by canonical name: the same on every rank."""
    from slope_megatron.models.shapes import canonical_shapes
    from slope_megatron.sparsity import counter

    found = {}
    for name, shape in canonical_shapes(config.model, rows=96, positions=16).items():
        rows, columns = (*shape, 1)[:2]
        numbers = counter.normal(counter.key_of(7, name), range(rows), range(columns), columns).double().view(shape)
        found[name] = numbers * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return found


def by_whole_passes(config):
    """The same by running the whole model anew for each block, and sorting scores."""
    from slope_megatron.models.dense import load_dense
    from slope_megatron.models.layer_spec import block_linears, sparse_linears
    from slope_megatron.models.provider import build_model

    dense = dataclasses.replace(config, slope=dataclasses.replace(config.slope, enabled=False))
    model = build_model(dense, VOCABULARY, torch.float64)
    load_dense(model, dense, dense_weights(config))
    found = {}
    for layer in model.decoder.layers:
        block = layer.layer_number - 1
        linears = {name: block_linears(layer)[name] for name in sparse_linears(config.slope, block)}
        seen = {name: [] for name in linears}
        hooks = [
            linear.register_forward_pre_hook(lambda _, arguments, store=seen[name]: store.append(arguments[0].detach()))
            for name, linear in linears.items()
        ]
        for index in range(SAMPLES):
            one = sample(index)
            model(one["tokens"][None], one["position_ids"][None], None, labels=one["labels"][None])
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            norm = torch.cat([x.flatten(0, -2) for x in seen[name]]).norm(dim=0)
            groups = (linear.weight.detach().abs() * norm).unflatten(-1, (-1, 4))
            keep = torch.zeros_like(groups).scatter(-1, groups.argsort(-1, descending=True)[..., :2], 1.0).flatten(-2)
            with torch.no_grad():
                linear.weight.mul_(keep)
            part = "mlp" if "fc" in name else "self_attention"
            found[f"decoder.layers.{block}.{part}.{name}"] = linear.weight.detach().clone()
    return found


@pytest.mark.parametrize("gated", [False, True], ids=["opt", "llama"])
def test_wanda_equals_whole_passes_at_any_size(ranks, gated):
    slope = {"pattern": "wanda", "wanda_samples": SAMPLES}
    common = {"slope": slope, "gated": gated, "init_from": "somewhere"}
    expected = ranks.run(by_whole_passes, small_config(**common), world=1)[0]
    alone = ranks.run(calibrate, small_config(**common), world=1)[0]
    assert alone.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(alone[name], weight), name
    config = small_config(**common, tensor_parallel=2, sequence_parallel=True)
    parts = ranks.run(calibrate, config, world=2, tensor_parallel=2)
    for name, weight in expected.items():
        halves = [part[name] for part in parts]
        if name.endswith("fc1") and gated:  # gate and up lie above each other in each part
            whole = torch.cat([torch.cat([half.chunk(2)[which] for half in halves]) for which in (0, 1)])
        else:
            whole = torch.cat(halves, dim=1 if name.endswith(("fc2", "proj")) else 0)
        assert torch.equal(whole, weight), name


def devices_while_measuring(config):
    """Whether the model that is measured went through `to_own_device`, which does nothing without a GPU."""
    from slope_megatron.models import provider
    from slope_megatron.training import wanda

    moved = []
    wanda.to_own_device = lambda model: moved.append(model) or provider.to_own_device(model)
    used = []
    wanda.prune_in_place = lambda model, *_: used.append(model) or {}
    samples = [sample(index) for index in range(SAMPLES)]
    wanda.calibrated_masks(config, VOCABULARY, torch.float64, dense_weights(config), samples)
    return [model is whole for model, whole in zip(used, moved, strict=True)]


def test_all_of_the_measured_model_is_on_the_ranks_device(ranks):
    """Megatron's norms are born on the CPU, whatever the linears are on."""
    config = small_config(slope={"pattern": "wanda", "wanda_samples": SAMPLES}, init_from="somewhere")
    assert ranks.run(devices_while_measuring, config, world=1) == [[True]]


def test_what_cannot_be_calibrated_is_refused():
    from slope_megatron.training.wanda import check

    slope = {"pattern": "wanda", "wanda_samples": SAMPLES}
    with pytest.raises(ValueError, match=r"--slope-pattern wanda with --pipeline-parallel 2: .*--stop-at 0, then"):
        check(small_config(slope=slope, init_from="x", pipeline_parallel=2), SAMPLES)
    with pytest.raises(ValueError, match="--slope-wanda-samples is 5 and the run has 4 training samples"):
        check(small_config(slope=slope, init_from="x"), SAMPLES - 1)
    check(small_config(slope=slope, init_from="x"), SAMPLES)
