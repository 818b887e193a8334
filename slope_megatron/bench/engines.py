"""The trainer's engines on synthetic batches, for benchmarks of whole steps: built as `slope pretrain` builds them."""

import contextlib
import io
from typing import Any

import torch
from megatron.core import parallel_state

from slope_megatron.bench.dense_float8 import round_linears
from slope_megatron.config import Config, ModelConfig
from slope_megatron.data.batches import MicroBatches
from slope_megatron.data.prefetch import Prefetch
from slope_megatron.models.layer_spec import weights_to_prune
from slope_megatron.models.shapes import own_rows
from slope_megatron.planner.layout import Layout
from slope_megatron.planner.memory import Holding, fullest_gpu, precision
from slope_megatron.training.engine import Engine
from slope_megatron.training.pretrain import build_engine
from slope_megatron.training.teardown import Remains

GIB = 2**30


class RandomSamples:
    """Samples of random tokens as `data.batches` gives them, the same under the same number in every process."""

    def __init__(self, model: ModelConfig, sequence: int):
        self.model, self.sequence = model, sequence

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(own_rows(self.model), (self.sequence + 1,), generator=generator)
        sample = {"tokens": tokens[:-1], "labels": tokens[1:]}
        if self.model.architecture == "gpt":
            return sample | {"loss_mask": torch.ones(self.sequence), "position_ids": torch.arange(self.sequence)}
        hidden = torch.rand(self.sequence, generator=generator) < 0.15
        sample |= {"loss_mask": hidden.float(), "padding_mask": torch.ones_like(tokens[1:])}
        return sample | {"types": torch.zeros_like(tokens[1:]), "is_next": tokens[0] % 2}


class BuiltEngine:
    """An engine and its batches; `free` gives all its memory back.

    Args:
        float8: a dense model's linears multiply in e4m3, which the trainer itself has for 2:4 ones alone.
    Attributes:
        started_with: bytes allocated before it was built.
    """

    def __init__(self, config: Config, dtype: torch.dtype, float8: bool = False):
        self.started_with = allocated()
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory
            self.engine: Engine = build_engine(config, own_rows(config.model), dtype, None, None)[0]
        pruned = {id(weight) for weight in weights_to_prune(self.engine.model, config.slope)} if float8 else set()
        linears = [one for one in self.engine.model.modules() if id(getattr(one, "weight", None)) in pruned]
        self.rounded = round_linears(linears)
        data = config.data
        samples: Any = RandomSamples(config.model, data.seq_length)
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        batches = MicroBatches(samples, data.global_batch_size, data.micro_batch_size, replica, replicas)
        self.batches = Prefetch(batches, config.train.last_step, pin=torch.cuda.is_available())

    def step(self):
        """The next training step, from fetching its batches on."""
        result = self.engine.train_step(self.batches.step(self.engine.steps_done))
        for linear in self.rounded:
            linear.refresh()
        return result

    def replays(self) -> bool:
        """Whether its micro-batches are replayed from CUDA graphs by now."""
        graphs = self.engine.graphs
        return graphs is not None and any(function.graph is not None for function in graphs.functions)

    def let_go(self) -> Remains:
        self.batches.close()
        self.rounded.clear()
        remains = Remains(self.engine)
        del self.engine
        return remains

    def free(self) -> str:
        """Let the engine go.

        Returns:
            which of the engine's tensors are alive nevertheless, so that the next engine's memory will be wrong; empty:
            none is.
        """
        return self.let_go().alive()


def device_bytes() -> int:
    """Memory of the GPU; 0: there is none."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_allocated() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def planned_bytes(config: Config, replicas: int = 1) -> float:
    """What `slope plan` counts at the peak, without what it assumes for CUDA's context and fragmentation."""
    tensor = config.parallel.tensor_parallel
    layout = Layout(tensor, 1, replicas, sequence_parallel=tensor > 1)
    how = Holding(precision("bf16", "fp32", config.slope.fp8 != "off"), "kernels", fused=True)
    sizes = fullest_gpu(config, layout, own_rows(config.model), how)
    return sum(size for name, size in sizes.items() if name not in ("context", "fragmentation"))
