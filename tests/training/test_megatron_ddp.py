"""Megatron-core's own data parallelism and optimizer instead of DeepSpeed: packed gradients through `main_grad`."""

import pytest
import torch

from helpers.models import VOCABULARY, small_config, step_batches

STEPS = 6


def tokens_loss(model, batch):
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return (output.float() * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


def with_torch(config):
    """One process, torch's AdamW."""
    from slope_megatron.models.provider import build_model

    model = build_model(config, VOCABULARY, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-5)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = step_batches(config, step, 0, 1)
        total = sum(tokens_loss(model, batch) for batch in batches) / len(batches)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(total.item())
    return losses


def with_megatron(config):
    """Megatron's DistributedDataParallel, gradient finalizer, fp32 optimizer and schedule."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from slope_megatron.models.layer_spec import sparse_modules
    from slope_megatron.models.provider import build_model

    model = build_model(config, VOCABULARY, torch.float32)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    wrapped = DistributedDataParallel(model.config, settings, model)
    model.config.finalize_model_grads_func = finalize_model_grads
    adamw = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.01, "adam_beta2": 0.999, "adam_eps": 1e-5}
    optimizer = get_megatron_optimizer(OptimizerConfig(**adamw, clip_grad=0.5, params_dtype=torch.float32), [wrapped])

    def forward_step(iterator, chunk):
        batch = next(iterator)
        output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        mask = batch["loss_mask"]

        def loss_function(losses):
            loss = (losses.float() * mask).sum() / mask.sum()
            return loss, {"loss": loss.detach().clone()}

        return output, loss_function

    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses = []
    for step in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        batches = step_batches(config, step, replica, replicas)
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[wrapped],
            num_microbatches=len(batches),
            seq_length=config.data.seq_length,
            micro_batch_size=config.data.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        for module in sparse_modules(model):
            module.refresh()
        mean = torch.stack([result["loss"] for result in results]).mean()
        dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        losses.append(mean.item() / replicas)
    packed = next(iter(sparse_modules(model))).weight
    return losses, packed.main_grad.shape == packed.shape


@pytest.mark.parametrize(
    ("tensor_parallel", "data_parallel", "sequence_parallel"), [(1, 2, False), (2, 2, False), (2, 1, True)]
)
def test_megatrons_own_data_parallelism_equals_one_process(ranks, tensor_parallel, data_parallel, sequence_parallel):
    expected = ranks.run(with_torch, small_config(), world=1)[0]
    assert expected[-1] < 0.98 * expected[0]
    config = small_config(tensor_parallel=tensor_parallel, sequence_parallel=sequence_parallel)
    world = tensor_parallel * data_parallel
    for losses, packed in ranks.run(with_megatron, config, world=world, tensor_parallel=tensor_parallel):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert packed, "main_grad has the packed shape"
