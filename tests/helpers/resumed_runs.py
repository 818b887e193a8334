"""A run that is not interrupted, and the same one resumed from a checkpoint: results and states, to the bit."""

import torch

from helpers.models import build_engine, step_batches

SLOPE = {"adapter_rank": 4, "lazy_fraction": 0.5, "backward_mask_interval": 4}


def train(engine, config, until, save_at=(), run=None):
    from megatron.core import parallel_state

    from slope_megatron.training import checkpoint

    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    results = []
    while engine.steps_done < until:
        result = engine.train_step(step_batches(config, engine.steps_done, replica, replicas))
        results.append((result.loss, result.grad_norm))
        if engine.steps_done in save_at:
            checkpoint.save(engine, run)
    return results


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
    results = train(engine, config, 10, save_at, run)
    return results, state_of(engine)


def resumed(config, dtype, run, step):
    from slope_megatron.training import checkpoint

    engine = build_engine(config, dtype)
    folder = checkpoint.folder_of(run, step)
    checkpoint.read_state(folder, config)
    # Garbage everywhere: what is right afterwards came from the files.
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(7.0)
        for name, buffer in engine.model.named_buffers():
            if name.endswith(("_pattern", "_column")):
                buffer.fill_(255)
    checkpoint.load(engine, folder)
    return train(engine, config, 10), state_of(engine)


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name], tensor), name
    for (name, partition, state), (_, expected_partition, expected_state) in zip(found[1], expected[1], strict=True):
        assert torch.equal(partition, expected_partition), f"masters of {name}"
        for key, value in expected_state.items():
            assert torch.equal(state[key], value), f"{key} of {name}"
