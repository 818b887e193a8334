"""A small Mixtral through the plugin's builder, on gloo ranks of any expert- and tensor-parallel layout."""

import dataclasses
import types

import torch
import torch.distributed as dist
import torch.nn.functional as F

from helpers.experts_on_gloo import exchange_dispatch, exchange_streams

VOCABULARY, LENGTH, BLOCKS = 128, 16, 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes as Megatron's flags name them."""

    tensor: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    dispatcher: str = "alltoall"

    @property
    def world(self) -> int:
        return max(self.tensor, (self.expert_tensor or self.tensor) * self.expert)


def start(layout: Layout) -> None:
    """Groups of this layout in place of those that the rank has."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from slope_megatron.integrations import cpu_host
    from slope_megatron.integrations.megatron_lm.specs import complete_router

    cpu_host.prepare()
    complete_router()
    exchange_streams()
    exchange_dispatch()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def transformer_config(layout: Layout, **more):
    from megatron.core.transformer.transformer_config import TransformerConfig

    off = "gradient_accumulation_fusion persist_layer_norm masked_softmax_fusion bias_dropout_fusion".split()
    settings = {
        "num_layers": BLOCKS,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": layout.dispatcher,
        "tensor_model_parallel_size": layout.tensor,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor or layout.tensor,
        "sequence_parallel": layout.tensor > 1,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **dict.fromkeys(off, False),
        **more,
    }
    return TransformerConfig(**settings)


def build(layout: Layout, slope, seed: int = 1, **more):
    """The model as `--slope` builds it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from slope_megatron.integrations.megatron_lm import plugin

    config = transformer_config(layout, **more)
    args = types.SimpleNamespace(seed=seed, init_method_std=0.02, num_layers=BLOCKS, overlap_grad_reduce=False)
    plugin.settings = lambda: (args, slope)
    return plugin.with_sparse_layers(GPTModel)(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def in_data_parallel(model):
    """Megatron's own data parallelism around it: gradients of experts go over other ranks than the rest."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    return DistributedDataParallel(model.config, config, model)


def batch(step: int) -> torch.Tensor:
    """This data-parallel rank's samples of the four of a step."""
    from megatron.core import parallel_state

    samples = torch.randint(0, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(step))
    return samples.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]


def forward_backward(ddp, step: int) -> float:
    """Gradients as Megatron makes them whole; the mean loss over all samples."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    ddp.zero_grad_buffer()
    tokens = batch(step)
    positions = torch.arange(LENGTH).expand_as(tokens)
    loss = ddp(tokens, positions, None, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    finalize_model_grads([ddp])
    total = loss.detach().clone()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total / parallel_state.get_data_parallel_world_size())


def metadata() -> dict:
    """What Megatron's `sharded_state_dict` takes."""
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def tensors(model, of=lambda parameter: parameter.detach()) -> list[tuple]:
    """`(name, offset, shape, part)` of everything that a checkpoint holds here, parameters as `of` makes them."""
    from slope_megatron.models.canonical import shards

    parameters = dict(model.named_parameters())
    found = []
    for shard in shards(model):
        data = shard.data.detach()
        if shard.local_name in parameters:
            rows = slice(shard.first_local_row, shard.first_local_row + data.shape[0])
            data = of(parameters[shard.local_name])[rows]
        found.append((shard.name, shard.offset, shard.shape, data.clone()))
    return found


def together(parts_of_ranks: list[list[tuple]]) -> dict[str, torch.Tensor]:
    """Whole tensors, of all ranks' parts; copies are the same to rounding."""
    whole, seen = {}, {}
    for name, offset, shape, part in (entry for parts in parts_of_ranks for entry in parts):
        target = whole.setdefault(name, torch.zeros(shape, dtype=part.dtype))
        known = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        place = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
        if known[place].any():
            torch.testing.assert_close(target[place], part, rtol=1e-4, atol=1e-7)
        target[place], known[place] = part, True
    assert all(known.all() for known in seen.values())
    return whole
