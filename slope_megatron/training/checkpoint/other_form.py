"""A checkpoint of the model's other form: packed weights for a dense model, dense ones for a model of pruned weights.

N out, K in, C = K n/m kept per row, of this rank's shard: no shard cuts a group, so a shard changes its form alone.

                   dense from packed                            packed from dense
    pattern                                                     the n largest masters of every m
    weight, master, first moment   at their places, else 0      read at the kept places
    second moment                  at their places, else the mean of the group's kept ones (`second_moments`)

A baseline's weights are dense already: a dense model takes them as they are, and leaves what is derived from them.
Masks and the second pruning of a model that goes on pruned are chosen anew.
"""

import dataclasses
from fractions import Fraction
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from slope_megatron.config import SlopeConfig
from slope_megatron.models.dense import DERIVED
from slope_megatron.models.init_weights import choose_derived
from slope_megatron.models.layer_spec import linears_to_prune, pruned_modules
from slope_megatron.sparsity import second_moments
from slope_megatron.sparsity.packing import pack, pack_bits, unpack, unpack_bits
from slope_megatron.sparsity.pattern import magnitude_pattern
from slope_megatron.training.checkpoint.engine_state import sharded_engine_state
from slope_megatron.training.engine import Engine
from slope_megatron.training.zero.partitions import MOMENTS, gathered, shape_of

KINDS = ("model", "fp32", *MOMENTS)
PATTERN = "_pattern"


class OtherForm:
    """Reads a checkpoint whose form is not the engine's.

    Args:
        engine: of the form that goes on.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.from_packed = engine.run_config.slope.packed and engine.form == "dense"
        names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
        pruned = linears_to_prune(engine.model, engine.run_config.slope) if engine.run_config.slope.packed else ()
        # Packed in one of the forms: settings of the block, shape here.
        self.packed: dict[str, tuple[SlopeConfig, torch.Size]] = {
            names[id(linear.weight)]: (slope, shape_of(linear.weight)) for linear, slope in pruned
        }

    def sharded_state(self) -> dict[str, dict[str, Any]]:
        """What to read, as `sharded_engine_state` has it for the engine's own form."""
        state = sharded_engine_state(self.engine, filled=False)
        model = state["model"]
        for name in [name for name in model if name.rpartition(".")[2] in DERIVED]:
            del model[name]
        for name, (slope, (rows, columns)) in self.packed.items():
            share = Fraction(slope.n, slope.m) if self.from_packed else Fraction(slope.m, slope.n)
            own = model[name]
            weight = torch.empty(rows, int(columns * share), dtype=own.data.dtype)
            model[name] = resized(own, weight)
            if self.from_packed:
                bits = torch.empty(rows, columns // 8, dtype=torch.uint8)
                model[name + PATTERN] = resized(dataclasses.replace(own, key=own.key + PATTERN), bits)
            for kind in KINDS[1:]:
                values = torch.empty(weight.shape, dtype=torch.float32)
                state[kind][name] = make_sharded_optimizer_tensor(model[name], values, f"optimizer.{kind}")
        return state

    @torch.no_grad()
    def converted(self, state: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """What was read, in the engine's form; in place."""
        for name, (slope, _) in self.packed.items():
            read = {kind: state[kind][name] for kind in KINDS}
            if self.from_packed:
                mask = unpack_bits(state["model"].pop(name + PATTERN))
                made = {kind: unpack(values, mask) for kind, values in read.items()}
                made["exp_avg_sq"] = second_moments.spread(read["exp_avg_sq"], mask, slope.n, slope.m)
            else:
                # A master's magnitude has fewer ties than that of the weight, which is it rounded.
                mask = magnitude_pattern(read["fp32"], slope.n, slope.m)
                made = {kind: pack(values, mask) for kind, values in read.items()}
                state["model"][name + PATTERN] = pack_bits(mask)
            for kind, values in made.items():
                state[kind][name] = values
        return state

    def choose_derived(self) -> None:
        """Once the state is installed: what a pruned model derives from its weights."""
        for module in pruned_modules(self.engine.model):
            with gathered(module.weight):
                choose_derived(module)


def resized(entry, data: torch.Tensor):
    """A sharded matrix's entry for one with other columns, cut over the ranks alike."""
    if isinstance(entry, ShardedTensorFactory):
        return dataclasses.replace(entry, data=data)
    share = Fraction(data.shape[1], entry.local_shape[1])
    (rows, columns), (first_row, first_column) = entry.global_shape, entry.global_offset
    return dataclasses.replace(
        entry,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=(rows, int(columns * share)),
        global_offset=(first_row, int(first_column * share)),
    )
