"""Training in one process with torch alone, which the engine is compared with; and what is trained."""

import torch

from helpers.models import VOCABULARY, step_batches

# Some seeds of the post-norm BERT magnify rounding a hundred times within 8 steps, on one process too: not this one.
FAMILIES = {"opt": {}, "llama": {"gated": True}, "bert": {"bert": True, "seed": 2}}
# The column pattern is chosen anew three times, the adapters join at step 6 of 10.
SLOPE = {"adapter_rank": 4, "lazy_fraction": 0.4, "backward_mask_interval": 3, "lr_multiplier": 2.0}
# Where two magnitudes are nearly equal, another order of sums may let another one survive the second pruning. That is
# no rounding any more; so on GPUs, whose orders differ more, the pattern stays the first one.
SLOPE_ON_GPUS = {**SLOPE, "backward_mask_interval": 0}


def parts_of_loss(config, model, batches):
    """Each batch's part of one step's loss: sums over what counts, divided by its number in all `batches` together."""
    from slope_megatron.training.objectives import OBJECTIVES

    objective, bert = OBJECTIVES[config.model.architecture], config.model.architecture == "bert"
    tokens = sum(batch["loss_mask"].sum() for batch in batches)
    samples = sum(len(batch["tokens"]) for batch in batches)
    for batch in batches:
        output = objective.forward(model, batch)
        losses, next_logits = output if bert else (output, None)
        part = (losses * batch["loss_mask"]).sum() / tokens
        if bert:
            wrong = torch.nn.functional.cross_entropy(next_logits, batch["is_next"], reduction="sum")
            part = part + wrong / samples
        yield part


def reference(config, steps):
    """The same steps with torch alone: one process, plain AdamW on the packed parameters, late add_param_group."""
    from slope_megatron.models.canonical import shards
    from slope_megatron.models.layer_spec import sparse_modules
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.optim.optimizer import ADAPTERS, parameter_groups
    from slope_megatron.training.schedule import Phases

    model = build_model(config, VOCABULARY, torch.float32)
    phases = Phases(config)
    settings = config.optimizer
    groups = parameter_groups(model, config)
    adapters = [group for group in groups if group["name"] == ADAPTERS]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["name"] != ADAPTERS],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    losses, norms = [], []
    for step in range(steps):
        if phases.adapters_join(step):
            optimizer.add_param_group(adapters[0])
            for module in sparse_modules(model):
                module.adapters_active = True
        device = next(model.parameters()).device
        batches = [
            {name: tensor.to(device) for name, tensor in batch.items()} for batch in step_batches(config, step, 0, 1)
        ]
        optimizer.zero_grad()
        total = 0.0
        for loss in parts_of_loss(config, model, batches):
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)))
        for group in optimizer.param_groups:
            group["lr"] = phases.learning_rate(step, group["name"])
        optimizer.step()
        if phases.new_column_pattern(step + 1):
            for module in sparse_modules(model):
                module.update_column_pattern()
        losses.append(total)
    parts = [(shard.name, shard.offset, shard.shape, shard.data.detach().clone()) for shard in shards(model)]
    return losses, norms, parts
