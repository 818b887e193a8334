"""One rank on a GPU: its groups, a small model, batches with something to learn."""

import contextlib
import tempfile

import pytest
import torch

from slope_megatron.config import Config, DataConfig, ModelConfig, OptimizerConfig, SlopeConfig, TrainConfig

VOCABULARY, SEQUENCE, MICRO = 192, 256, 4


def say_rank(patch: pytest.MonkeyPatch) -> None:
    """What DeepSpeed asks of the environment."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        patch.setenv(name, value)


@contextlib.contextmanager
def one_rank():
    """This process as the only rank, over NCCL where there is a GPU."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        say_rank(patch)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def gpu_config(*, slope=None, parallel=None, optimizer=None, **train) -> Config:
    """4 blocks of width 256, 2:4 everywhere but in the first linear; adapters in the last tenth."""
    from slope_megatron.config import ParallelConfig

    return Config(
        slope=SlopeConfig(**{"adapter_rank": 16, "lazy_fraction": 0.1, "backward_mask_interval": 50, **(slope or {})}),
        model=ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, vocab_multiple=192),
        data=DataConfig(data="none", seq_length=SEQUENCE, micro_batch_size=MICRO, global_batch_size=2 * MICRO),
        parallel=ParallelConfig(**(parallel or {})),
        optimizer=OptimizerConfig(**{"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 20, **(optimizer or {})}),
        train=TrainConfig(out="none", **{"steps": 200, "dtype": "bf16", **train}),
    )


def batches(config: Config, step: int) -> list[dict]:
    """One step's micro-batches: two tokens in three follow from the one before."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for _ in range(config.data.micro_batches(1)):
        tokens = torch.randint(0, VOCABULARY, (MICRO, SEQUENCE + 1), generator=generator)
        for place in range(1, SEQUENCE + 1):
            if place % 3:
                tokens[:, place] = (tokens[:, place - 1] * 7 + 3) % VOCABULARY
        found.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": torch.ones(MICRO, SEQUENCE),
                "position_ids": torch.arange(SEQUENCE).expand(MICRO, -1).contiguous(),
            }
        )
    return found


def build_engine(config: Config, dtype=torch.bfloat16):
    from slope_megatron.models.provider import build_model
    from slope_megatron.training.engine import Engine

    return Engine(build_model(config, VOCABULARY, dtype), config, dtype)


def trained_losses(config: Config, steps: int, dtype=torch.bfloat16) -> list[float]:
    """Losses of the first steps of a run of `config`."""
    engine = build_engine(config, dtype)
    return [engine.train_step(batches(config, step)).loss for step in range(steps)]
