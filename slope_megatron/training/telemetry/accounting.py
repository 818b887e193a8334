"""Measured bytes and measured extra zeros of one model, summed over the ranks that share it."""

import enum
import itertools

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slope_megatron.models.layer_spec import linears_to_prune, masked_modules, sparse_modules, weights_to_prune
from slope_megatron.sparsity.pattern import extra_zeros
from slope_megatron.training.engine import Engine
from slope_megatron.training.optim.optimizer import ADAPTERS, is_adapter, is_sparse, model_parameters
from slope_megatron.training.parallel import is_counted_here
from slope_megatron.training.zero import offload, partitions

KINDS = ("weights", "patterns", "operands", "gradients", "optimizer")


def elements(parameter: torch.nn.Parameter) -> int:
    """Of the whole parameter on this tensor-parallel rank, also while ZeRO-3 has cut it."""
    return partitions.shape_of(parameter).numel()


def tensors_of(value, apart_from: tuple[torch.Tensor, ...] = ()) -> list[torch.Tensor]:
    """The tensors that an operands object holds, singly, in dicts or in parts of its own; one for each piece of memory.

    Args:
        apart_from: what lies in the memory of others: a parameter that operands read where it lies, bitmasks that they
            keep by reference.
    """
    held: dict[int, torch.Tensor] = {}
    parts = [part for item in vars(value).values() for part in (item.values() if isinstance(item, dict) else (item,))]
    for part in parts:
        if isinstance(part, torch.Tensor):
            inner = [part]
        else:
            inner = tensors_of(part) if hasattr(part, "__dict__") and not isinstance(part, enum.Enum) else []
        held |= {tensor.untyped_storage().data_ptr(): tensor for tensor in inner}
    for tensor in apart_from:
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return list(held.values())


def local_bytes(engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes of this rank's share of one model: of the packed linears (or their dense baselines), and of all of it.

    Weights and gradients as they are in use, whole; the optimizer's as ZeRO has cut it.
    """
    sparse_weights = {id(weight) for weight in weights_to_prune(engine.model, engine.config.slope)}
    sizes = {scope: dict.fromkeys(KINDS, 0) for scope in ("sparse_layers", "model")}

    def add(kind: str, count: int, sparse: bool) -> None:
        sizes["model"][kind] += count
        if sparse:
            sizes["sparse_layers"][kind] += count

    held = engine.held_gradients
    for name, parameter in model_parameters(engine.model):
        count = elements(parameter)
        add("weights", count * parameter.element_size(), id(parameter) in sparse_weights)
        if held and (held.adapters or not is_adapter(name)):
            add("gradients", count * held.width, id(parameter) in sparse_weights)
    for module in sparse_modules(engine.model):
        add("patterns", module.weight_pattern.nbytes + module.weight_column.nbytes, True)
        if module.keep_operands:
            with partitions.gathered(module.weight):
                shared = (module.weight, *module.pattern_buffers())
                add("operands", sum(tensor.nbytes for tensor in tensors_of(module.operands(), shared)), True)
    for masked in masked_modules(engine.model):
        add("patterns", sum(buffer.nbytes for buffer in masked.pattern_buffers()), True)
        # The masked copy.
        shared = (masked.weight, *masked.buffers())
        add("operands", sum(tensor.nbytes for tensor in tensors_of(masked.operands(), shared)), True)
    for partition in partitions.of(engine.optimizer):
        tensors = (partition.masters, *moments_of(engine, partition))
        add("optimizer", sum(tensor.nbytes for tensor in tensors), is_sparse(partition.group["name"]))
    return sizes


def moments_of(engine: Engine, partition: partitions.Partition) -> list[torch.Tensor]:
    state = engine.optimizer.optimizer.state[partition.masters]
    return [value for value in state.values() if torch.is_tensor(value) and value.dim()]


def state_bytes(engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes of one model: tensor-parallel shards added up, replicas counted once, the ZeRO partitions all added up."""
    local = local_bytes(engine)
    shards = torch.tensor([[local[scope][kind] for kind in KINDS] for scope in local], device=engine.device)
    everywhere = shards.clone()
    dist.all_reduce(everywhere)
    optimizer = KINDS.index("optimizer")
    over_model(shards)[:, optimizer] = everywhere[:, optimizer]
    return {scope: dict(zip(KINDS, row, strict=True)) for scope, row in zip(local, shards.tolist(), strict=True)}


# -- one rank ----------------------------------------------------------------------------------------------------------


def state_bytes_per_rank(engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes of training state on the fullest rank, `measured` (memory behind the tensors) and by `formula`; collective.

    Weights, gradients and optimizer as the ZeRO stage cuts them; with offload the optimizer's are in host memory, or on
    a disk and counted as nothing.
    """
    found = {"measured": measured_rank_bytes(engine), "formula": formula_rank_bytes(engine)}
    table = torch.tensor([list(sizes.values()) for sizes in found.values()], device=engine.device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    kinds = found["measured"]
    return {how: dict(zip(kinds, row, strict=True)) for how, row in zip(found, table.tolist(), strict=True)}


def measured_rank_bytes(engine: Engine) -> dict[str, int]:
    """What this rank's tensors occupy; gradients as they were noted before the step."""
    named = [parameter for _, parameter in model_parameters(engine.model)]
    weights = [*named, *(parameter.ds_tensor for parameter in named if partitions.is_cut(parameter))]
    parts = partitions.of(engine.optimizer)
    states = [tensor for part in parts for tensor in (part.masters, *moments_of(engine, part))]
    return {
        "weights": partitions.storage_bytes(weights),
        "gradients": engine.held_gradients.bytes if engine.held_gradients else 0,
        "optimizer": partitions.storage_bytes(states),
    }


def other_elements(engine: Engine) -> dict[int, int]:
    """Of packed weights, here or in the form that the run also trains: what they have there, by id; none: the same."""
    run = engine.run_config
    if not (run.slope.packed and run.switches):
        return {}
    found = {}
    for linear, slope in linears_to_prune(engine.model, run.slope):
        here, there = (slope.m, slope.n) if engine.form == "dense" else (slope.n, slope.m)
        found[id(linear.weight)] = elements(linear.weight) * there // here
    return found


def formula_rank_bytes(engine: Engine, *, adapters: bool | None = None, other_form: bool = False) -> dict[str, int]:
    """The same from shapes, stage, replicas and type alone.

    Args:
        adapters: whether they have gradients; None: as in the step whose gradients were noted.
        other_form: of the model's other form, which the run also trains.

    P elements of a group, D replicas, b bytes a weight; groups padded to multiples of 2 D, in stage 3 parameters to D:

        stage       1                        2              3
        weights     b P                      b P            b P / D, and what is small whole
        gradients   4 P                      4 P / D        4 P / D
        optimizer   12 P / D                 12 P / D       12 P / D; what is on an NVMe disk is not in memory
    """
    parallel = engine.config.parallel
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    sizes = dict.fromkeys(("weights", "gradients", "optimizer"), 0)
    offloaded = parallel.offload_optimizer != "none"
    held = engine.held_gradients
    no_step = adapters is None and held is None
    if adapters is None:
        adapters = held is not None and held.adapters
    width = engine.dtype.itemsize
    others = other_elements(engine) if other_form else {}
    for name, members in engine.members.items():
        counts = [others.get(id(parameter), elements(parameter)) for parameter in members]
        if parallel.zero_stage == 3:
            parts = [-(-count // replicas) for count in counts]
            limit = partitions.small_parameter(engine.config)
            small = [part for part, count in zip(parts, counts, strict=True) if count <= limit]
            # A lone replica's gathered parameter is its part itself.
            sizes["weights"] += width * (sum(parts) + (replicas * sum(small) if replicas > 1 else 0))
            if not offload.swaps(engine.optimizer, sum(parts)):
                sizes["gradients"] += 4 * sum(parts)
                sizes["optimizer"] += 12 * sum(parts)
            continue
        whole = -(-sum(counts) // (2 * replicas)) * 2 * replicas
        part = whole // replicas
        sizes["weights"] += width * whole
        sizes["optimizer"] += 12 * part
        if parallel.zero_stage == 2 and (offloaded or width == 2):
            sizes["gradients"] += 4 * part
        elif parallel.zero_stage == 2:
            # What no loss has used yet gets zeros beside its room in DeepSpeed's buffer.
            copies = 2 if name == ADAPTERS and not adapters else 1
            sizes["gradients"] += 4 * copies * touched(counts, replica * part, (replica + 1) * part)
        elif engine.dtype == torch.bfloat16 and not offloaded:
            sizes["gradients"] += 4 * whole
        elif name != ADAPTERS or adapters:
            sizes["gradients"] += 4 * sum(counts)
    if no_step:
        sizes["gradients"] = 0
    return sizes


def touched(counts: list[int], start: int, end: int) -> int:
    """Elements of the parameters of which a part lies in [start, end) of their group, and what pads it at the end.

    DeepSpeed keeps the fp32 gradients of these parameters whole.
    """
    last = list(itertools.accumulate(counts))
    padding = max(0, end - max(start, last[-1]))
    return padding + sum(count for count, stop in zip(counts, last, strict=True) if stop > start and stop - count < end)


# -- the second pruning, parameters ------------------------------------------------------------------------------------


def double_pruning(engine: Engine) -> dict[str, float] | None:
    """The second pruning over the whole model, measured, beside the formula; None without packed weights."""
    if not engine.config.slope.packed:
        return None
    sums = torch.zeros(5, dtype=torch.float64, device=engine.device)
    for module in sparse_modules(engine.model):
        with partitions.gathered(module.weight):
            count = module.double_pruning()
        expected = count.weights * extra_zeros(module.slope.n, module.slope.m)
        row = [count.weights, count.dropped, expected, count.energy, count.energy_dropped]
        sums += torch.tensor(row, dtype=torch.float64, device=engine.device)
    weights, dropped, expected, energy, energy_dropped = over_model(sums).tolist()
    return {
        "measured": dropped / weights,
        "formula": expected / weights,
        "energy_lost": energy_dropped / energy if energy else 0.0,
    }


def over_model(here: torch.Tensor) -> torch.Tensor:
    """Summed, in place, over the ranks that share one replica of the model."""
    dist.all_reduce(here, group=parallel_state.get_model_parallel_group())
    return here


def parameter_count(engine: Engine) -> int:
    """Parameters held by one replica of the model: shards added up, replicated ones and tied copies once."""
    here = sum(
        elements(parameter)
        for _, parameter in model_parameters(engine.model)
        if is_counted_here(parameter) and not getattr(parameter, "ds_pipe_replicated", False)
    )
    return int(over_model(torch.tensor([here], device=engine.device)))


def checkpoint_bytes(engine: Engine) -> int:
    """Bytes of one checkpoint, in the larger form of the model: the weights, their fp32 masters and two moments, and
    the patterns.
    """
    counted = [parameter for _, parameter in model_parameters(engine.model) if is_counted_here(parameter)]
    others = other_elements(engine)
    here = sum(
        max(elements(parameter), others.get(id(parameter), 0)) * (parameter.element_size() + 12)
        for parameter in counted
    )
    here += sum(one.weight_pattern.nbytes + one.weight_column.nbytes for one in sparse_modules(engine.model))
    return int(over_model(torch.tensor([here], device=engine.device)))


# -- the device --------------------------------------------------------------------------------------------------------


def device_name(engine: Engine) -> str:
    return torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"


def peak_memory_bytes(engine: Engine) -> int | None:
    """Of tensors, at the highest moment, on the fullest rank; collective. None: no GPU."""
    if engine.device.type != "cuda":
        return None
    peak = torch.tensor([torch.cuda.max_memory_allocated(engine.device)], device=engine.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak)
