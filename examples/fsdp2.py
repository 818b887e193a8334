"""A sparse model under FSDP2: sparsify first, then `fully_shard`; patterns stay whole on every rank.

python examples/fsdp2.py                                  # one process
torchrun --nproc-per-node 2 examples/fsdp2.py             # the same losses
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from slope_megatron import follow_optimizer, sparsify
from slope_megatron.launch.ports import free_port
from slope_megatron.torch_layers import sparse_linears

VOCABULARY, LENGTH, BATCH, STEPS = 128, 32, 8, 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def start_ranks() -> None:
    """A process that no launcher has started is a group of one."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=rank, world_size=world)


def build() -> LlamaForCausalLM:
    torch.manual_seed(1234)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(DEVICE)
    sparsify(model, pattern="random")
    for linear in sparse_linears(model).values():
        linear.keeps_operands = False  # built for each use: no rank keeps what belongs to all of the weights
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(step: int) -> torch.Tensor:
    """This rank's part of the step's tokens: every token is 7 more than the one before."""
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    tokens = (start + 7 * torch.arange(LENGTH)) % VOCABULARY
    return tokens.chunk(dist.get_world_size())[dist.get_rank()].to(DEVICE)


def main() -> None:
    start_ranks()
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    follow_optimizer(model, optimizer, steps=STEPS)
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
