"""Sparse models under torch.compile, DDP, FSDP2, DeepSpeed and accelerate: the losses of one plain process."""

import os

import pytest
import torch
import torch.distributed as dist
import transformers
from torch_layers.test_sparsify import LLAMA

from slope_megatron.torch_layers import after_step, follow_optimizer, sparse_linears, sparsify

STEPS, RANKS = 4, 2


def model(**settings):
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    return sparsify(plain, backward_mask_interval=2, **settings).train()


def tokens(step: int, rank: int) -> torch.Tensor:
    return torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(10 * step + rank))


def losses(called, sparse, ranks) -> list[float]:
    """Mean loss of each step; `ranks`: whose samples this process computes, one micro-batch each."""
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    follow_optimizer(sparse, optimizer, steps=STEPS)
    found = []
    for step in range(STEPS):
        total = 0.0
        for rank in ranks:
            loss = called(input_ids=tokens(step, rank), labels=tokens(step, rank)).loss / len(ranks)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


def expected(**settings) -> list[float]:
    sparse = model(**settings)
    return losses(sparse, sparse, range(RANKS))


ADAPTERS = {"adapter_rank": 4, "lazy_fraction": 0.5}


def mean(found: list[float]) -> list[float]:
    total = torch.tensor(found, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / RANKS).tolist()


def under_ddp(settings):
    sparse = model(**settings)
    wrapped = torch.nn.parallel.DistributedDataParallel(sparse, broadcast_buffers=False)
    return mean(losses(wrapped, sparse, [dist.get_rank()]))


def under_fsdp(settings, keep):
    from torch.distributed.fsdp import fully_shard

    sparse = model(**settings)
    for linear in sparse_linears(sparse).values():
        linear.keeps_operands = keep
    for block in sparse.model.layers:
        fully_shard(block)
    fully_shard(sparse)
    found = mean(losses(sparse, sparse, [dist.get_rank()]))
    weight = sparse.model.layers[0].mlp.up_proj.weight
    assert weight.to_local().shape == (weight.shape[0] // RANKS, weight.shape[1])
    return found


def test_one_plain_process_under_compile():
    sparse = model()
    compiled = torch.compile(sparse, backend="aot_eager")
    assert losses(compiled, sparse, range(RANKS)) == pytest.approx(expected(), rel=1e-6)


@pytest.mark.parametrize("settings", ({}, ADAPTERS), ids=("plain", "adapters"))
def test_two_ranks_of_ddp_are_one(ranks, settings):
    for found in ranks.run(under_ddp, settings, world=RANKS):
        assert found == pytest.approx(expected(**settings), rel=1e-6)


@pytest.mark.parametrize("keep", (True, False), ids=("resident", "rebuilt"))
@pytest.mark.parametrize("settings", ({}, ADAPTERS), ids=("plain", "adapters"))
def test_two_ranks_of_fsdp2_are_one(ranks, settings, keep):
    for found in ranks.run(under_fsdp, settings, keep, world=RANKS):
        assert found == pytest.approx(expected(**settings), rel=1e-6)


def under_deepspeed(stage):
    import deepspeed

    sparse = model(**ADAPTERS)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine = deepspeed.initialize(model=sparse, config=config, model_parameters=list(sparse.parameters()))[0]
    found = []
    for step in range(STEPS):
        batch = tokens(step, dist.get_rank())
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        after_step(sparse, step + 1, steps=STEPS)
        found.append(loss.item())
    return mean(found)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_two_ranks_of_zero_are_one(ranks, stage):
    """Within the rounding of its own AdamW; in the last step adapters move, whose idle steps it has counted."""
    for found in ranks.run(under_deepspeed, stage, world=RANKS):
        assert found[:-1] == pytest.approx(expected(**ADAPTERS)[:-1], rel=2e-5)
        assert found[-1] == pytest.approx(expected(**ADAPTERS)[-1], rel=1e-2)


def under_accelerate():
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # accelerate asks for it, though the group is there
    os.environ.setdefault("MASTER_PORT", "1")
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    sparse = model(**ADAPTERS)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    follow_optimizer(sparse, optimizer, steps=STEPS)
    wrapped, optimizer = accelerator.prepare(sparse, optimizer)
    assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    found = []
    for step in range(STEPS):
        batch = tokens(step, accelerator.process_index)
        loss = wrapped(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return mean(found)


def test_two_ranks_of_accelerate_are_one(ranks):
    for found in ranks.run(under_accelerate, world=RANKS):
        assert found == pytest.approx(expected(**ADAPTERS), rel=1e-6)
