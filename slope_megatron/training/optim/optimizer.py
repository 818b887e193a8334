"""Parameter groups, and the optimizer over them.

Under `--slope-mup` packed values are in one group for each density d, "sparse_1_2" for 2:4: their learning rate is
divided by d and their decay multiplied, so that lr x decay stays (SmuPar, arXiv 2405.15743).
"""

from collections.abc import Iterator
from fractions import Fraction

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule

from slope_megatron.config import Config, SlopeConfig, parse_nm
from slope_megatron.layers.marks import mark
from slope_megatron.models.layer_spec import weights_to_prune
from slope_megatron.models.rules import EMBEDDING
from slope_megatron.training.optim.adam import build_adamw
from slope_megatron.training.optim.lamb import Lamb
from slope_megatron.training.parallel import is_counted_here
from slope_megatron.training.together import from_every_rank
from slope_megatron.training.zero import partitions
from slope_megatron.training.zero.gradients import tied_weight

SPARSE, DENSE, EMBEDDINGS, NO_DECAY, ADAPTERS = "sparse", "dense", "embeddings", "no_decay", "adapters"


def parameter_groups(model: LanguageModule, config: Config) -> list[dict]:
    """Named groups: packed values, other matrices, biases and norms (no decay), adapters. Empty groups are left out.

    Embeddings are among the other matrices, or a group of their own where a rate or a decay of their own is asked for;
    so checkpoints of runs that ask for none keep their groups.
    """
    # The dense twin groups the same weights, so that bytes and learning rates compare like with like.
    sparse = weights_to_prune(model, config.slope)
    sparse_names = sorted({sparse_group(config.slope, nm) for nm in config.slope.patterns})
    members: dict[str, list] = {name: [] for name in (*sparse_names, DENSE, EMBEDDINGS, NO_DECAY, ADAPTERS)}
    # The last pipeline stage's copy of a tied embedding goes by the output layer's name.
    tied = tied_weight(model)
    for name, parameter in model.named_parameters():
        if parameter in sparse:
            members[sparse_group(config.slope, sparse[parameter].nm)].append(parameter)
        elif is_adapter(name):
            members[ADAPTERS].append(parameter)
        elif parameter.dim() < 2:
            members[NO_DECAY].append(parameter)
        elif config.optimizer.groups_embeddings and (EMBEDDING.search(name) or parameter is tied):
            members[EMBEDDINGS].append(parameter)
        else:
            members[DENSE].append(parameter)
    fill_empty_groups(model, members)
    decay = dict.fromkeys(members, config.optimizer.weight_decay) | {NO_DECAY: 0.0}
    decay[EMBEDDINGS] = config.optimizer.embedding_decay
    if config.slope.enabled:
        decay |= {name: config.optimizer.sparse_decay * density_of(name) for name in sparse_names}
    return [
        {"name": name, "params": parameters, "weight_decay": decay[name]}
        for name, parameters in members.items()
        if parameters
    ]


def sparse_group(slope: SlopeConfig, nm: str) -> str:
    """The group of packed values of N:M."""
    if not slope.mup:
        return SPARSE
    density = Fraction(*parse_nm(nm))
    return f"{SPARSE}_{density.numerator}_{density.denominator}"


def is_sparse(group: str) -> bool:
    return group.startswith(SPARSE)


def density_of(group: str) -> float:
    """That which a sparse group's name gives; 1 where it gives none."""
    terms = group.removeprefix(SPARSE).strip("_")
    return float(Fraction(terms.replace("_", "/"))) if terms else 1.0


def is_adapter(name: str) -> bool:
    return name.endswith((".adapter_l", ".adapter_r"))


def fill_empty_groups(model: LanguageModule, members: dict[str, list]) -> None:
    """Give this stage a placeholder in each group that only other pipeline stages have.

    DeepSpeed sums the gradient norm over the model-parallel ranks group by group: with other groups on each stage (a
    middle one has no embedding) the ranks would wait for each other for ever.
    """
    here = [name for name, parameters in members.items() if parameters]
    everywhere = from_every_rank(here, parallel_state.get_model_parallel_group())
    for name in sorted({name for names in everywhere for name in names} - set(here)):
        like = next(model.parameters())
        placeholder = torch.nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
        mark(placeholder, is_placeholder=True)
        # The block's own parameters, of which it has none, are in no checkpoint.
        model.decoder.register_parameter(f"placeholder_{name}", placeholder)
        members[name].append(placeholder)


def model_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """`named_parameters` without the placeholders."""
    named = model.named_parameters()
    return ((name, parameter) for name, parameter in named if not getattr(parameter, "is_placeholder", False))


def build_optimizer(groups: list[dict], config: Config) -> torch.optim.Optimizer:
    """AdamW or LAMB over the named groups; DeepSpeed puts its fp32 partitions in their place."""
    settings = config.optimizer
    if settings.optimizer == "adamw":
        return build_adamw(groups, config)
    betas = (settings.beta1, settings.beta2)
    return Lamb(groups, lr=settings.lr, betas=betas, eps=settings.eps, trust_no_decay=settings.lamb_trust_no_decay)


def attach_lamb(zero_optimizer, members: dict[str, list[torch.nn.Parameter]]) -> None:
    """Tell LAMB where ZeRO has put the parameters, and over which ranks their norms are summed.

    Args:
        members: the parameters of each group by its name, as they were before `deepspeed.initialize`.
    """
    group = parallel_state.get_tensor_and_data_parallel_group()
    device = torch.device(torch.cuda.current_device())

    def piece(segment: partitions.Segment) -> tuple[slice, bool]:
        return slice(segment.start, segment.start + segment.numel), is_counted_here(segment.parameter)

    def sum_over_ranks(squares: torch.Tensor) -> None:
        # Offloaded state is on the CPU, where NCCL cannot reach.
        total = squares.to(device)
        dist.all_reduce(total, group=group)
        squares.copy_(total)

    flats = [partition.masters for partition in partitions.of(zero_optimizer)]
    pieces = [[piece(segment) for segment in own] for own in partitions.segments(zero_optimizer, members)]
    zero_optimizer.optimizer.attach(list(zip(flats, pieces, strict=True)), sum_over_ranks)
