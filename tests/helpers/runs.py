"""Run folders without training: a built model saved in the form that `training.checkpoint.store` writes."""

import dataclasses
import json
from pathlib import Path

import torch

from helpers.families import VOCABULARY, bare_model, hf_config, our_config


def randomise(model, std: float = 0.2, seed: int = 0) -> None:
    """New numbers in every parameter, biases, norms and adapters too, so that nothing can be forgotten unnoticed."""
    from slope_megatron.models.init_weights import choose_derived

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(numbers * std + shift)
    choose_derived(model)


def save_run(model, config, run: Path, step: int) -> Path:
    """`run` with one checkpoint of `model`; one rank calls it. Returns the checkpoint's folder."""
    from slope_megatron.config.saved import saved_form
    from slope_megatron.models.canonical import sharded_state_dict
    from slope_megatron.storage import sums, whole
    from slope_megatron.training.checkpoint import store
    from slope_megatron.training.checkpoint.snapshot import Snapshot

    target = store.folder_of(run, step)
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir(parents=True)
    snapshot = Snapshot({"model": sharded_state_dict(model)})
    manifest = snapshot.write_index(partial, [snapshot.write(partial)])
    content = saved_form(config.to_dict())
    state = {"format": store.FORMAT, "steps_done": step, "optimizer_steps": {}, **content}
    whole.write_json(partial / "state.json", state)
    manifest["state.json"] = sums.seal(partial / "state.json")
    whole.write_json(run / "run.json", {**content, "dtype": "fp64", "versions": {"torch": torch.__version__}})
    store.publish(partial, target, manifest)
    return target


def batch():
    """Tokens, a mask that hides the end of the second sample, and token types `[2, 12]`."""
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    return tokens, mask, (torch.arange(12) > 5).long().expand_as(tokens)


def trained_run(config, run, step, adapters, std):
    """Save a model of random numbers as a run; its logits."""
    from slope_megatron.models.init_weights import init_weights
    from slope_megatron.models.layer_spec import pruned_modules

    model = bare_model(config)
    init_weights(model, seed=3, init_std=0.1, num_layers=config.model.num_layers)
    randomise(model, std)
    for module in pruned_modules(model):
        module.adapters_active = adapters
        module.drop_operands()
    model.eval()
    save_run(model, config, run, step)
    tokens, mask, types = batch()
    with torch.no_grad():
        if config.model.architecture == "bert":
            logits, binary = model(tokens, mask, types)
            return logits[..., :VOCABULARY].clone(), binary.clone()
        return model(tokens, torch.arange(12).expand_as(tokens), None)[..., :VOCABULARY].clone(), None


def made_run(ranks, folder, name, *, slope=None, adapters=True, data=None, std=0.2, **changes):
    """A run of a family, and the logits of its model."""
    from slope_megatron.export.hf_config import model_config

    config = our_config(model_config(hf_config(name, **changes)), slope=slope or {"adapter_rank": 4})
    train = dataclasses.replace(config.train, steps=100)
    where = dataclasses.replace(config.data, data=str(data)) if data else config.data
    config = dataclasses.replace(config, train=train, data=where)
    # The adapters join at step 99.
    step = 100 if adapters else 50
    return config, ranks.run(trained_run, config, folder, step, adapters and config.slope.enabled, std, world=1)[0]


def started_logits(config, checkpoint):
    """Logits of the model that `--init-from checkpoint` would start with."""
    from slope_megatron.models.dense import load_dense
    from slope_megatron.models.dense_checkpoint import MegatronCheckpoint

    model = bare_model(config)
    load_dense(model, config, MegatronCheckpoint(checkpoint), config.slope.pattern)
    tokens, _, _ = batch()
    with torch.no_grad():
        return model.eval()(tokens, torch.arange(12).expand_as(tokens), None)[..., :VOCABULARY].clone()


def edit_state(checkpoint: Path, *, active: tuple[str, ...] = (), **changes: dict | None) -> None:
    """Make a checkpoint one of another version, and seal it again.

    Args:
        active: names to add to those of the settings with an effect.
        changes: section -> {key: new value; `...`: the setting goes}; None: the section goes.
    """
    from slope_megatron.storage import whole

    state = json.loads((checkpoint / "state.json").read_text())
    state["config_active"] += active
    for section, values in changes.items():
        if values is None:
            del state["config"][section]
            continue
        part = {**state["config"].get(section, {}), **values}
        state["config"][section] = {key: value for key, value in part.items() if value is not ...}
    whole.write_json(checkpoint / "state.json", state)
    reseal(checkpoint, "state.json")


def reseal(checkpoint: Path, name: str) -> None:
    """Let a checkpoint's manifest have what a file holds now."""
    from slope_megatron.storage import sums

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[name] = sums.seal(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
