"""Measured bytes and measured extra zeros of one model, summed over the ranks that share it."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.models.fill import sparse_modules
from slope_megatron.models.layer_spec import twin_weights
from slope_megatron.sparsity.pattern import extra_zeros
from slope_megatron.training.engine import Engine
from slope_megatron.training.optimizer import SPARSE, model_parameters

KINDS = ("weights", "patterns", "operands", "gradients", "optimizer")


def tensors_of(value) -> list[torch.Tensor]:
    """The tensors that an operands object holds."""
    return [item for item in vars(value).values() if isinstance(item, torch.Tensor)]


def local_bytes(engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes held by this rank, for the packed linears (or their dense twins) and for the whole model."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    twins = {names[id(weight)] for weight in twin_weights(engine.model, engine.config.slope)}
    sizes = {scope: dict.fromkeys(KINDS, 0) for scope in ("sparse_layers", "model")}

    def add(kind: str, count: int, sparse: bool) -> None:
        sizes["model"][kind] += count
        if sparse:
            sizes["sparse_layers"][kind] += count

    for name, parameter in model_parameters(engine.model):
        add("weights", parameter.nbytes, name in twins)
        add("gradients", engine.gradient_bytes.get(name, 0), name in twins)
    for module in sparse_modules(engine.model):
        add("patterns", module.weight_pattern.nbytes + module.weight_column.nbytes, True)
        add("operands", sum(tensor.nbytes for tensor in tensors_of(module.operands())), True)
    base = engine.optimizer.optimizer
    for group in base.param_groups:
        for partition in group["params"]:
            states = [value for value in base.state[partition].values() if torch.is_tensor(value) and value.dim()]
            add("optimizer", sum(tensor.nbytes for tensor in (partition, *states)), group["name"] == SPARSE)
    return sizes


def state_bytes(engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes of one model: tensor-parallel shards added up, replicas counted once, the ZeRO partitions all added up."""
    local = local_bytes(engine)
    shards = torch.tensor([[local[scope][kind] for kind in KINDS] for scope in local], device=engine.device)
    partitions = shards.clone()
    dist.all_reduce(shards, group=parallel_state.get_model_parallel_group())
    dist.all_reduce(partitions)
    optimizer = KINDS.index("optimizer")
    shards[:, optimizer] = partitions[:, optimizer]
    return {scope: dict(zip(KINDS, row, strict=True)) for scope, row in zip(local, shards.tolist(), strict=True)}


def double_pruning(engine: Engine) -> dict[str, float] | None:
    """The second pruning over the whole model, measured, beside the formula; None without packed weights."""
    if not engine.config.slope.packed:
        return None
    sums = torch.zeros(5, dtype=torch.float64, device=engine.device)
    for module in sparse_modules(engine.model):
        count = module.double_pruning()
        expected = count.weights * extra_zeros(module.slope.n, module.slope.m)
        row = [count.weights, count.dropped, expected, count.energy, count.energy_dropped]
        sums += torch.tensor(row, dtype=torch.float64, device=engine.device)
    dist.all_reduce(sums, group=parallel_state.get_model_parallel_group())
    weights, dropped, expected, energy, energy_dropped = sums.tolist()
    return {
        "measured": dropped / weights,
        "formula": expected / weights,
        "energy_lost": energy_dropped / energy if energy else 0.0,
    }


def parameter_count(engine: Engine) -> int:
    """Parameters held by one replica of the model: shards added up, replicated ones and tied copies once."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    here = sum(
        parameter.numel()
        for _, parameter in model_parameters(engine.model)
        if (tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False))
        and not getattr(parameter, "ds_pipe_replicated", False)
    )
    total = torch.tensor([here], device=engine.device)
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total)
