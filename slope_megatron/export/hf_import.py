"""Hugging Face's weights under canonical names, and what each becomes on the way there and back.

    weights = HfWeights(hf_state_dict, hf_config)      # a mapping {canonical name: whole dense tensor}
    load_dense(our_model, config, weights)             # slope_megatron.models.dense

Tensors are transformed when they are asked for, so the state dict may be one that reads files lazily.
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping

import torch

from slope_megatron.config import ModelConfig
from slope_megatron.export.hf_config import as_dict, model_config
from slope_megatron.export.hf_names import FAMILIES, LEGACY, Family, Row

# What stands outside the body, whose names take the family's prefix.
HEADS = ("lm_head.", "cls.")


def interleave(tensors: tuple[torch.Tensor, ...], model: ModelConfig) -> torch.Tensor:
    """Q, K and V `[heads d, ...]` -> `[(H + 2 G) d, ...]`: Megatron's order, group by group."""
    groups = [tensor.unflatten(0, (model.query_groups, -1)) for tensor in tensors]
    return torch.cat(groups, dim=1).flatten(0, 1)


TRANSFORMS: dict[str, Callable[[tuple[torch.Tensor, ...], ModelConfig], torch.Tensor]] = {
    "plain": lambda tensors, _: tensors[0],
    "transpose": lambda tensors, _: tensors[0].t(),
    "qkv": interleave,
    "qkv_split": lambda tensors, model: interleave(tensors[0].chunk(3), model),
    "qkv_conv1d": lambda tensors, model: interleave(tensors[0].t().chunk(3), model),
    "stack": lambda tensors, _: torch.cat(tensors),
    "positions": lambda tensors, _: tensors[0][2:],
}


def split_groups(tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """`[(H + 2 G) d, ...]`, group by group -> Q `[H d, ...]`, K and V `[G d, ...]`."""
    groups = tensor.unflatten(0, (model.query_groups, model.num_attention_heads // model.query_groups + 2, -1))
    return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)


# How their tensors come from ours.
INVERSES = {
    "plain": lambda tensor, _: (tensor,),
    "transpose": lambda tensor, _: (tensor.t(),),
    "qkv": split_groups,
    "qkv_split": lambda tensor, model: (torch.cat(split_groups(tensor, model)),),
    "qkv_conv1d": lambda tensor, model: (torch.cat(split_groups(tensor, model)).t(),),
    "stack": lambda tensor, _: tensor.chunk(2),
    "positions": lambda tensor, _: (torch.cat((tensor.new_zeros(2, tensor.shape[1]), tensor)),),
}


def full_name(name: str, prefix: str) -> str:
    """A name of the table as their state dict has it."""
    return name if name.startswith(HEADS) else prefix + name


def table_rows(family: Family, model: ModelConfig) -> list[Row]:
    """The table of a whole model: its ends, an output layer of its own if it has one, and every block."""
    rows = [*family.body, *(() if model.tie_embeddings else family.head)]
    for block in range(model.num_layers):
        for canonical, how, names in family.block:
            experts = getattr(model, "num_experts", 1) if "{e}" in canonical else 1
            rows += [
                (canonical.format(i=block, e=expert), how, tuple(name.format(i=block, e=expert) for name in names))
                for expert in range(experts)
            ]
    return rows


class HfWeights(Mapping[str, torch.Tensor]):
    """A Hugging Face state dict under canonical names: `{canonical name: whole dense tensor}`.

    Raises:
        ValueError: a tensor is missing, or there is one that would be silently dropped.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], hf_config):
        fields = as_dict(hf_config)
        family = FAMILIES[fields["model_type"]]
        self.model = model_config(fields)
        self.state = state
        # Their name without the prefix of the body, in today's spelling -> the key in `state`.
        self.keys_by_name = {bare_name(key, family.prefix): key for key in state}
        self.rows = {row[0]: row for row in table_rows(family, self.model)}
        self.check(family)

    def check(self, family: Family) -> None:
        wanted = {name for _, _, names in self.rows.values() for name in names}
        present = set(self.keys_by_name)
        missing = sorted(wanted - present)
        if missing:
            raise ValueError(
                f"the Hugging Face weights lack {len(missing)} of {len(wanted)} tensors, {missing[0]} for one: give "
                "the whole state dict of a model with its language-model heads"
            )
        copies = {copy: original for copy, original in family.ties if copy in present - wanted}
        for copy, original in copies.items():
            if not torch.equal(self.theirs(copy), self.theirs(original)):
                raise ValueError(
                    f"the Hugging Face weights hold a {copy} that is not the {original} it should be tied to: set "
                    "tie_word_embeddings to false in their configuration, or give weights that are tied"
                )
        unknown = [
            name
            for name in sorted(present - wanted - copies.keys())
            if not any(fnmatch.fnmatch(name, pattern) for pattern in family.ignored)
        ]
        if unknown:
            raise ValueError(
                f"the Hugging Face weights have {len(unknown)} tensors that this model does not have, {unknown[0]} for "
                "one: give the state dict that belongs to this configuration"
            )

    def theirs(self, name: str) -> torch.Tensor:
        """A tensor by its name in the table."""
        return self.state[self.keys_by_name[name]]

    def __getitem__(self, name: str) -> torch.Tensor:
        _, how, names = self.rows[name]
        return TRANSFORMS[how](tuple(map(self.theirs, names)), self.model)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def bare_name(name: str, prefix: str) -> str:
    """A name of a state dict as the tables have it."""
    for old, new in LEGACY.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name.removeprefix(prefix)
