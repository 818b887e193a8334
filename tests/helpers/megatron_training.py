"""Megatron-LM's training loop in small: a GPT of the plugin under megatron-core's data parallelism and optimizer.

What `megatron.training.training.train` does around the plugin's hooks, on any number of ranks, without its arguments.
"""

import dataclasses
import types

VOCABULARY, SEQUENCE, LAYERS = 128, 32, 4
# Samples of a step, each a micro-batch of its own.
SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Host:
    """How Megatron is asked to train, and SLoPe's settings.

    Args:
        overlap_grad_reduce: gradients are reduced during backward, in several buckets.
        overlap_param_gather: weights are gathered in the next forward.
        engine: the layer spec is Transformer Engine's.
        chunks: parts of each pipeline stage, under a virtual pipeline.
        look_at: steps after which the model is evaluated and its state collected, as for a checkpoint.
    """

    steps: int = 6
    bf16: bool = False
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    engine: bool = False
    chunks: int = 1
    look_at: tuple[int, ...] = ()
    slope: dict = dataclasses.field(default_factory=dict)
    config: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    """What one rank saw: losses of steps and of evaluations, and the second prunings and adapters in each state."""

    losses: list[float]
    evaluations: list[float]
    states: list[dict]


def arguments(host: Host):
    """Megatron's `args`, as far as the plugin reads them."""
    return types.SimpleNamespace(
        seed=1,
        init_method_std=0.1,
        num_layers=LAYERS,
        curr_iteration=0,
        train_iters=host.steps,
        overlap_grad_reduce=host.overlap_grad_reduce,
        overlap_param_gather=host.overlap_param_gather,
        use_distributed_optimizer=host.distributed_optimizer,
    )


def transformer_config(host: Host):
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    off = "gradient_accumulation_fusion persist_layer_norm masked_softmax_fusion bias_dropout_fusion".split()
    dtype = torch.bfloat16 if host.bf16 else torch.float32
    settings = dict.fromkeys(off, False) | host.config
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=64,
        num_attention_heads=4,
        init_method_std=0.1,
        use_cpu_initialization=not torch.cuda.is_available(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=host.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        virtual_pipeline_model_parallel_size=host.chunks if host.chunks > 1 else None,
        # As Megatron-LM's arguments have it: of two stages, batched messages would be taken for each other.
        overlap_p2p_comm=host.chunks > 1,
        batch_p2p_comm=host.chunks == 1,
        **settings,
    )


def build(config, args, slope, engine: bool = False) -> list:
    """This rank's parts of the model, of which the plugin's hook makes the linears sparse."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt import gpt_layer_specs as specs

    from slope_megatron.integrations.megatron_lm import plugin

    plugin.settings = lambda: (args, slope)
    # As the upstream's builder calls them.
    norms = {"qk_layernorm": config.qk_layernorm}
    local = specs.get_gpt_layer_local_spec(**norms, normalization=config.normalization)
    spec = specs.get_gpt_layer_with_transformer_engine_spec(**norms) if engine else local
    parts = config.virtual_pipeline_model_parallel_size
    parallel_state.set_virtual_pipeline_model_parallel_world_size(parts)
    models = []
    for part in range(parts or 1):
        model = plugin.with_sparse_layers(GPTModel)(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage() and part == 0,
            post_process=parallel_state.is_pipeline_last_stage() and part == (parts or 1) - 1,
            share_embeddings_and_output_weights=True,
            vp_stage=part if parts else None,
        ).to(config.params_dtype)
        models.append(model.cuda() if torch.cuda.is_available() else model)
    return models


def wrapped(models: list, config, host: Host):
    """(Megatron's data parallelism around each part of the model, its optimizer), tied to the schedule."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    replicas = DistributedDataParallelConfig(
        use_distributed_optimizer=host.distributed_optimizer,
        overlap_grad_reduce=host.overlap_grad_reduce,
        overlap_param_gather=host.overlap_param_gather,
        grad_reduce_in_fp32=True,
        bucket_size=40_000 if host.overlap_grad_reduce else None,
    )
    models = [Float16Module(config, model) if host.bf16 else model for model in models]
    chunks = [DistributedDataParallel(config, replicas, model) for model in models]
    settings = OptimizerConfig(
        optimizer="adam",
        lr=3e-3,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=host.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=host.distributed_optimizer,
        overlap_param_gather=host.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(settings, chunks)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if host.overlap_grad_reduce:
        ways = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = ways if len(chunks) > 1 else ways[0]
    return chunks, optimizer


def samples(step: int):
    """This data-parallel rank's micro-batches of a step, `[1, SEQUENCE]` each."""
    import torch
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    for index in range(rank, SAMPLES, parallel_state.get_data_parallel_world_size()):
        generator = torch.Generator().manual_seed(1000 * step + index)
        start = torch.randint(0, VOCABULARY, (1, 1), generator=generator)
        yield (start + 7 * torch.arange(SEQUENCE + 1)) % VOCABULARY


def own_positions():
    """Of a sequence in 2 C pieces, pieces r and 2 C - 1 - r: rank r of C context-parallel ones has them."""
    import torch
    from megatron.core import parallel_state

    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    pieces = torch.arange(SEQUENCE).chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])


def forward_step(batches, model):
    """As the upstream's: (output, what makes a loss of it)."""
    import torch

    tokens = next(batches)
    tokens = tokens.cuda() if torch.cuda.is_available() else tokens
    positions = own_positions().to(tokens.device)[None]
    output = model(tokens[:, positions[0]], positions, None, labels=tokens[:, positions[0] + 1])

    def loss(losses):
        count = torch.tensor(losses.numel(), dtype=torch.int)
        return losses.float().sum(), count, {"loss": losses.detach().float().mean()}

    return output, loss


def run_schedule(chunks, step: int, forward_only: bool = False) -> float:
    """One step's micro-batches through Megatron's schedule; their mean loss over all replicas."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[samples(step) for _ in chunks] if len(chunks) > 1 else samples(step),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=SAMPLES // parallel_state.get_data_parallel_world_size(),
        seq_length=SEQUENCE,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    # Stages that are not the last one know nothing of the loss.
    total = sum(float(item["loss"]) for item in found) / SAMPLES
    # Ranks that see the same samples, whole or in part.
    same = parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
    sums = torch.tensor([total / same], dtype=torch.float64)
    sums = sums.cuda() if torch.cuda.is_available() else sums
    dist.all_reduce(sums)
    return sums.item()


def bare_step(step: int, chunks, optimizer) -> float:
    """As the upstream's `train_step`."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss = run_schedule(chunks, step)
    optimizer.step()
    return loss


def look(chunks, host: Host, step: int) -> tuple[float, dict]:
    """The state as a checkpoint would have it, and the loss of an evaluation."""
    if host.overlap_param_gather:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)
    states = [chunk.module.state_dict() for chunk in chunks]
    collected = {
        f"{number}.{name}": value.detach().clone()
        for number, state in enumerate(states)
        for name, value in state.items()
        if name.endswith(("weight_column", "adapter_l", "adapter_r"))
    }
    if host.overlap_param_gather:
        for chunk in chunks:
            chunk.disable_forward_pre_hook()
    loss = run_schedule(chunks, step, forward_only=True)
    if host.overlap_param_gather:
        for chunk in chunks:
            chunk.enable_forward_pre_hook()
    return loss, collected


def answer_as_a_gpu() -> None:
    """Megatron's distributed optimizer wants to see `torch.cuda.FloatTensor` and the like; its attention, a stream."""
    import torch

    name_type = torch.Tensor.type

    def named(self, *arguments, **keywords):
        found = name_type(self, *arguments, **keywords)
        return found if arguments or keywords else found.replace("torch.", "torch.cuda.")

    torch.Tensor.type = named
    torch.cuda.Stream = object


def train(host: Host) -> Outcome:
    """What a rank of this run saw."""
    from slope_megatron.config import SlopeConfig
    from slope_megatron.integrations import cpu_host
    from slope_megatron.integrations.megatron_lm import plugin

    if cpu_host.prepare():
        answer_as_a_gpu()
    args, slope = arguments(host), SlopeConfig(**{"backend": "reference", **host.slope})
    config = transformer_config(host)
    chunks, optimizer = wrapped(build(config, args, slope, host.engine), config, host)
    step = plugin.with_phase_and_refresh(lambda _forward, at, *both: bare_step(at, *both))
    outcome = Outcome([], [], [])
    for at in range(host.steps):
        args.curr_iteration = at
        outcome.losses.append(step(None, at, chunks, optimizer))
        if at + 1 in host.look_at:
            loss, state = look(chunks, host, at)
            outcome.evaluations.append(loss)
            outcome.states.append(state)
    return outcome
