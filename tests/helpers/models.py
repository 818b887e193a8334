"""A small model and its batches, as every distributed test builds them."""

import torch

from slope_megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SlopeConfig,
    TrainConfig,
)

VOCABULARY = 90
SEQUENCE = 16


def small_config(
    *,
    tensor_parallel=1,
    sequence_parallel=False,
    gated=False,
    bert=False,
    slope=None,
    layers=2,
    recompute="none",
    pipeline_parallel=1,
    **train,
) -> Config:
    """2 layers, width 64; gated: a LLaMA-shaped block; bert: BERT with both heads; else an OPT-shaped block."""
    post_norm = {"architecture": "bert", "activation": "gelu", "norm_eps": 1e-12}
    llama = {
        "activation": "silu",
        "gated_mlp": True,
        "normalization": "RMSNorm",
        "position": "rope",
        "linear_bias": False,
    }
    return Config(
        slope=SlopeConfig(**(slope or {})),
        model=ModelConfig(
            num_layers=layers,
            hidden_size=64,
            ffn_hidden_size=192 if gated else 256,
            num_attention_heads=8 if gated else 4,  # grouped queries: two heads a group
            vocab_multiple=48,
            # Wider than usual, so that a small model's branches matter.
            init_std=0.1,
            **({**llama, "tie_embeddings": False, "num_query_groups": 4} if gated else {}),
            **(post_norm if bert else {}),
        ),
        parallel=ParallelConfig(
            tensor_parallel=tensor_parallel,
            sequence_parallel=sequence_parallel,
            pipeline_parallel=pipeline_parallel,
            recompute=recompute,
        ),
        data=DataConfig(data="none", seq_length=SEQUENCE, micro_batch_size=2, global_batch_size=8),
        # A large epsilon: the key biases' true gradient is zero, and AdamW would blow its rounding up to full steps.
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, clip_grad=0.5, eps=1e-5),
        train=TrainConfig(out="none", **{"steps": 12, "eval_samples": 4, **train}),
    )


def sample(index: int) -> dict[str, torch.Tensor]:
    """The `index`-th training sample: tokens that depend on the index alone, with something to learn in them."""
    generator = torch.Generator().manual_seed(1000 + index % 16)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCE + 1,), generator=generator)
    tokens[1::2] = (tokens[0::2][: tokens[1::2].numel()] * 7 + 3) % VOCABULARY
    hidden = torch.rand(SEQUENCE, generator=generator) < 0.3
    hidden[index % SEQUENCE] = True
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": torch.ones(SEQUENCE),
        "position_ids": torch.arange(SEQUENCE),
        # For BERT alone.
        "hidden": hidden,
        "padding_mask": (torch.arange(SEQUENCE) < SEQUENCE - index % 3).long(),
        "types": (torch.arange(SEQUENCE) >= SEQUENCE // 2).long(),
        "is_next": torch.tensor(index % 2),
    }


def masked(batch: dict) -> dict:
    """The batch as BERT's: token 0 stands where a token is hidden, and the loss counts there."""
    hidden = batch["hidden"] & (batch["padding_mask"] > 0)
    tokens = batch["tokens"].masked_fill(hidden, 0)
    return {**batch, "tokens": tokens, "labels": batch["tokens"], "loss_mask": hidden.float()}


def step_batches(config: Config, step: int, replica: int, replicas: int) -> list[dict]:
    """Micro-batches of one step on one replica, cut as the data package cuts them."""
    micro, whole = config.data.micro_batch_size, config.data.global_batch_size
    first = step * whole
    batches = []
    for index in range(whole // (micro * replicas)):
        start = first + (index * replicas + replica) * micro
        samples = [sample(start + offset) for offset in range(micro)]
        batch = {key: torch.stack([item[key] for item in samples]) for key in samples[0]}
        batches.append(masked(batch) if config.model.architecture == "bert" else batch)
    return batches


def build_engine(config: Config, dtype=torch.float32, first_step=0):
    """An engine with a fresh model on this rank, for a step counted from 0 and those of the same form."""
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.engine import Engine

    return Engine(build_model(config.form_at(first_step), VOCABULARY, dtype), config, dtype, first_step)


def save(engine, run):
    """The folder of a checkpoint of the present step; all ranks call it."""
    from slope_megatron.training.checkpoint import store

    saving = store.Saving(engine, run)
    saving.write()
    assert not (problem := saving.finish()), problem
    return saving.target


def go_on(engine, until: int, save_at=(), run=None) -> list[tuple[float, float]]:
    """Losses and gradient norms up to step `until`; after the steps of `save_at` a checkpoint is saved in `run`."""
    from megatron.core import parallel_state

    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    results = []
    while engine.steps_done < until:
        result = engine.train_step(step_batches(engine.config, engine.steps_done, replica, replicas))
        results.append((result.loss, result.grad_norm))
        if engine.steps_done in save_at:
            save(engine, run)
    return results
