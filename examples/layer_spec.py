"""A Megatron GPT whose block linears are 2:4, in a training loop of your own: build, train, save, load.

    python examples/layer_spec.py             # one process, CPU or GPU, seconds; torchrun --nproc-per-node 2 works too

Tensor parallelism is the number of ranks. The model learns to continue sequences in which every token names the next.
"""

import os
import tempfile

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from slope_megatron.config import SlopeConfig
from slope_megatron.launch.ports import free_port
from slope_megatron.layers.attention import SdpaAttention
from slope_megatron.layers.column_parallel import SlopeColumnParallelLinear
from slope_megatron.layers.row_parallel import SlopeRowParallelLinear
from slope_megatron.models.init_weights import init_weights
from slope_megatron.models.layer_spec import sparse_modules

VOCABULARY, LENGTH, BATCH, STEPS = 128, 32, 8, 20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start_ranks() -> None:
    """One tensor-parallel group of all ranks; a process that no launcher has started is a group of one."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if DEVICE.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    if DEVICE.type == "cuda":
        model_parallel_cuda_manual_seed(1)


def sparse_spec() -> ModuleSpec:
    """Megatron's own layer spec with our linears in it, and torch's attention, which needs no GPU."""
    spec = get_gpt_layer_local_spec()
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    sparse = SlopeConfig(nm="2:4")
    attention.linear_qkv = mlp.linear_fc1 = SlopeColumnParallelLinear.configured(sparse)
    attention.linear_proj = mlp.linear_fc2 = SlopeRowParallelLinear.configured(sparse)
    attention.core_attention = SdpaAttention
    return spec


def build() -> GPTModel:
    """The model, with weights and patterns that depend on the seed alone, however many ranks share them."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        tensor_model_parallel_size=dist.get_world_size(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=DEVICE.type == "cpu",
        gradient_accumulation_fusion=False,  # serves dense linears alone, and needs NVIDIA's apex
    )
    model = GPTModel(config, sparse_spec(), vocab_size=VOCABULARY, max_sequence_length=LENGTH).to(DEVICE)
    init_weights(model, seed=1234, init_std=0.02, num_layers=config.num_layers)
    return model


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the tokens that follow them, `[BATCH, LENGTH]` each: every token is 7 more than the one before."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    tokens = (start + 7 * torch.arange(LENGTH + 1)) % VOCABULARY
    return tokens[:, :-1].to(DEVICE), tokens[:, 1:].to(DEVICE)


def mean_loss(model: GPTModel, step: int) -> torch.Tensor:
    tokens, labels = batch(step)
    positions = torch.arange(LENGTH, device=DEVICE).expand_as(tokens)
    return model(tokens, positions, attention_mask=None, labels=labels).mean()


def train(model: GPTModel) -> list[float]:
    """The loss of each step. AdamW sees ordinary parameters: the packed values."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        loss = mean_loss(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 9:  # a long run does this every 100 steps
            for module in sparse_modules(model):
                module.update_column_pattern()
    return losses


def main() -> None:
    start_ranks()
    model = build()
    losses = train(model)
    with tempfile.TemporaryDirectory() as folder:
        # Each rank's own shard. On GPUs Megatron's dist_checkpointing.save(model.sharded_state_dict(), folder) writes
        # a checkpoint that any number of ranks loads.
        torch.save(model.state_dict(), f"{folder}/weights.pt")
        loaded = build()
        loaded.load_state_dict(torch.load(f"{folder}/weights.pt", map_location=DEVICE))
    difference = (mean_loss(loaded, STEPS) - mean_loss(model, STEPS)).abs().item()
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; loaded again, the next loss differs by {difference}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
