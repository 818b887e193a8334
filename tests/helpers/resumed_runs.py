"""A run that is not interrupted, and the same one resumed from a checkpoint: results and states, to the bit."""

import torch

from helpers.models import build_engine, go_on

SLOPE = {"adapter_rank": 4, "lazy_fraction": 0.5, "backward_mask_interval": 4}


def state_of(engine):
    """Everything that the next step depends on, as this rank holds it."""
    model = {name: tensor.clone() for name, tensor in engine.model.state_dict().items() if tensor is not None}
    base = engine.optimizer.optimizer
    optimizer = [
        (
            group["name"],
            partition.detach().clone(),
            {key: value.clone() for key, value in base.state[partition].items()},
        )
        for group in base.param_groups
        for partition in group["params"]
    ]
    return model, optimizer


def uninterrupted(config, dtype, run, save_at):
    engine = build_engine(config, dtype)
    results = go_on(engine, 10, save_at, run)
    return results, state_of(engine)


def resumed(config, dtype, run, step):
    from slope_megatron.training.checkpoint import store

    engine = build_engine(config, dtype)
    folder = store.folder_of(run, step)
    store.check_state(folder, config)
    # Garbage everywhere: what is right afterwards came from the files.
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(7.0)
        for name, buffer in engine.model.named_buffers():
            if name.endswith(("_pattern", "_column")):
                buffer.fill_(255)
    store.load(engine, folder)
    return go_on(engine, 10), state_of(engine)


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name], tensor), name
    for (name, partition, state), (_, expected_partition, expected_state) in zip(found[1], expected[1], strict=True):
        assert torch.equal(partition, expected_partition), f"masters of {name}"
        for key, value in expected_state.items():
            assert torch.equal(state[key], value), f"{key} of {name}"


def check_resumed(ranks, config, dtype, run, steps, expected, **layout):
    """Resumed at each of `steps`, the run does and becomes what it did without interruption."""
    for step in steps:
        found = ranks.run(resumed, config, dtype, run, step, **layout)
        for (results, state), (expected_results, expected_state) in zip(found, expected, strict=True):
            assert results == expected_results[step:]
            assert_same(state, expected_state)
