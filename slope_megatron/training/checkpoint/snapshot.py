"""One rank's part of a checkpoint: planned by all ranks together, copied to host memory, written by each alone.

The files are megatron-core's `torch_dist` form, which is torch's distributed checkpoint. The three stages are kept
apart so that nothing between two collectives touches the disk: a disk error on one rank cannot leave the others
waiting. Writing needs no other process: megatron-core's own writer starts some, which outlive a rank that is killed.
"""

import collections
import dataclasses
import os
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint import SavePlan

from slope_megatron.storage import sums
from slope_megatron.storage.tensors import SummingWriter


@dataclasses.dataclass(frozen=True)
class Written:
    """What one rank wrote: torch's results for the index, and its files' entries in the manifest by name."""

    results: list
    manifest: dict[str, dict]


class Snapshot:
    """The state of a moment. Building it is collective; it shares no memory with the model.

    Args:
        state: sharded tensors and objects (nested dicts), as `engine_state.sharded_engine_state` makes them.
    """

    def __init__(self, state: dict):
        self.rank = dist.get_rank()
        sharded, self.common = save_preprocess(state)
        own = collections.defaultdict(list)
        for entry in nested_values(sharded):
            if not is_main_replica(entry.replica_id):
                continue
            if isinstance(entry, ShardedTensor):
                entry.data = entry.data.detach().to("cpu", copy=True)
            own[entry.unique_key if isinstance(entry, ShardedObject) else entry.key].append(entry)
        self.tensors = [entry for entries in own.values() for entry in entries if isinstance(entry, ShardedTensor)]
        self.planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self.planner.set_up_planner(mcore_to_pyt_state_dict(dict(own)), is_coordinator=self.rank == 0)
        plan = self.planner.create_local_plan()
        plans = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(plan, plans, dst=0)
        self.metadata = self.planner.create_global_plan(plans)[1] if self.rank == 0 else None
        self.plan = self.planner.finish_plan(plan)

    def write(self, folder: Path) -> Written:
        """Write this rank's file; no other rank is asked.

        Raises:
            OSError, RuntimeError: the file system's.
            ValueError: the state holds a number that is not finite.
        """
        for entry in self.tensors:
            if entry.data.is_floating_point() and not torch.isfinite(entry.data).all():
                raise ValueError(f"{entry.key} holds numbers that are not finite")
        folder.mkdir(parents=True, exist_ok=True)
        if not self.plan.items:
            return Written([], {})
        # The number of the rank in the file's name is its index among the plans.
        before = [SavePlan([])] * self.rank
        plan = SummingWriter(folder).prepare_global_plan([*before, self.plan])[self.rank]
        writer = SummingWriter(folder)
        results = writer.write_data(plan, self.planner).wait()
        return Written(results, writer.entries)

    def write_index(self, folder: Path, parts: list[Written]) -> dict[str, dict]:
        """What rank 0 adds once every rank has written: which tensor lies where; returns the whole manifest.

        Raises:
            RuntimeError: this is another rank.
        """
        if self.metadata is None:
            raise RuntimeError(f"rank {self.rank} does not know where all tensors lie: rank 0 writes the index")
        torch.save(self.common, folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        SummingWriter(folder).finish(self.metadata, [part.results for part in parts])
        manifest = {name: entry for part in parts for name, entry in part.manifest.items()}
        for name in ("common.pt", "metadata.json", ".metadata"):
            with open(folder / name, "rb") as stream:
                os.fsync(stream.fileno())
            manifest[name] = sums.seal(folder / name)
        return manifest
