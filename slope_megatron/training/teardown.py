"""Letting an engine go, so that another one has its memory."""

import gc
import weakref

import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from slope_megatron.training.engine import Engine


class Remains:
    """What an engine has held: it is taken apart here, and whoever holds it lets it go before `alive` is asked."""

    def __init__(self, engine: Engine):
        optimizer = engine.optimizer.optimizer
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        masters = [master for group in optimizer.param_groups for master in group["params"]]
        tensors = [*engine.model.parameters(), *engine.model.buffers(), *masters, *states]
        self.tensors = [(tuple(tensor.shape), weakref.ref(tensor)) for tensor in tensors]
        if engine.graphs:
            engine.graphs.drop()
        for parameter in engine.model.parameters():
            # The engine's sums, to which another engine's backward would add.
            vars(parameter).pop("gradient_sum", None)
        # DeepSpeed keeps names of parameters, with the parameters, and hooks on them.
        engine.deepspeed.destroy()
        forget_stage_3()

    def alive(self) -> str:
        """Give all memory back that nothing holds.

        Returns:
            which of the engine's tensors are alive nevertheless, and take room from the next engine; empty: none is.
        """
        clear()
        shapes = [shape for shape, tensor in self.tensors if tensor() is not None]
        return f"{len(shapes)} tensors outlive their engine, such as one of {shapes[0]}" if shapes else ""


def forget_stage_3() -> None:
    """What ZeRO-3 of DeepSpeed 0.19 keeps of every model, for good: a stack's lowest entry, and keys of a cache."""
    parameter_offload.FWD_MODULE_STACK.clear()
    method = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
    # Around the cache there is a function that calls it.
    for cell in getattr(method, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def clear() -> None:
    """Collect what is unreachable and give its memory back.

    What one collection finalizes, such as DeepSpeed's bf16 optimizer, lets go of more for the next.
    """
    for _ in range(5):
        if not gc.collect():
            break
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
