"""CUDA graphs of a micro-batch: the host asks the GPU for its kernels once, and replays them from then on.

A micro-batch of GPT-2 small is about a thousand kernels; asked for one by one they take the host longer than the GPU.
A graph repeats the very kernels on the very addresses that it was captured with. So whatever changes from one
micro-batch to the next is copied to where it was then (inputs, counts, keys of random numbers), and whatever may not
change is compared before each step (`addresses`): parameters, buffers, operands, and the choices that are on the host.
Where one of them differs, the step runs eagerly. A step is captured once nothing has differed between the beginnings of
two eager ones: by then each kernel is chosen and compiled, and every buffer has its last form.
"""

import enum
import functools
import gc
import logging
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from slope_megatron.config import Config
from slope_megatron.training.objectives import Batch

logger = logging.getLogger(__name__)
# Steps in a row that do not settle, after which the log says so.
RESTLESS = 16
# Attributes of modules that say what is computed.
SWITCHES = ("training", "adapters_active")
PLAIN = (bool, int, float, str, type(None), enum.Enum, torch.dtype, torch.device)


def unsupported(config: Config, dtype: torch.dtype) -> str | None:
    """Why this run's micro-batches cannot be captured; None: they can.

    Args:
        dtype: the parameters'.
    """
    parallel, model = config.parallel, config.model
    reasons = {
        "it has pipeline stages, whose micro-batches wait for each other": parallel.pipeline_parallel > 1,
        f"ZeRO-{parallel.zero_stage} reduces gradients inside each backward": parallel.zero_stage > 1,
        "the optimizer is offloaded": parallel.offload_optimizer != "none",
        "only bf16 training adds gradients up in place": dtype != torch.bfloat16,
        "recomputation would draw other dropout masks": parallel.recompute != "none" and model.dropout > 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def untried(config: Config) -> str | None:
    """Why `auto` does not capture what can be captured; None: a layout that the GPU tests have run."""
    replicas = parallel_state.get_data_parallel_world_size()
    layouts = {
        "tensor-parallel ranks": config.parallel.tensor_parallel > 1,
        "several replicas": replicas > 1,
    }
    what = next((what for what, holds in layouts.items() if holds), None)
    return what and f"no GPU has run them with {what} yet; --cuda-graphs on captures"


def wanted(config: Config, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to capture, as `--cuda-graphs` says; a line in the log says why not.

    Raises:
        ValueError: they are asked for and cannot be had.
    """
    asked = config.train.cuda_graphs
    if asked == "off" or (asked == "auto" and device.type != "cuda"):
        return False
    reason = "there is no CUDA device" if device.type != "cuda" else unsupported(config, dtype)
    if asked == "on" and reason:
        raise ValueError(f"--cuda-graphs is on and this run cannot be captured: {reason}; use --cuda-graphs auto")
    if asked == "auto":
        reason = reason or untried(config)
    if reason:
        logger.info("CUDA graphs: off, %s", reason)
    return reason is None


# -- what must not change ----------------------------------------------------------------------------------------------


def addresses(modules: Iterable[torch.nn.Module]) -> tuple[Hashable, ...]:
    """What a captured graph has taken for granted of these modules: where parameters, buffers and operands lie, and
    what they decide on the host."""
    found: list[Hashable] = []
    for module in modules:
        found.extend(getattr(module, name, None) for name in SWITCHES)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append(tensor.data_ptr())
        kept = getattr(module, "_kept", None)
        if kept is not None:
            found.append(id(kept.operands))
            collect(kept.operands, found, set())
    return tuple(found)


def collect(value, found: list[Hashable], seen: set[int]) -> None:
    """Add where the tensors of an object of ours lie, and its plain values: what kernels get from the host."""
    if isinstance(value, torch.Tensor):
        found.append(value.data_ptr())
    elif isinstance(value, PLAIN):
        found.append(value)
    elif id(value) in seen:
        return
    else:
        seen.add(id(value))
        for part in parts(value):
            collect(part, found, seen)


def parts(value) -> Iterable:
    if isinstance(value, dict):
        return (part for item in value.items() for part in item)
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    ours = type(value).__module__.startswith("slope_megatron.")
    return vars(value).values() if ours and hasattr(value, "__dict__") else ()


# -- capturing ---------------------------------------------------------------------------------------------------------


class Replayable(Protocol):
    """Something captured."""

    def replay(self) -> torch.Tensor:
        """Compute it again; its output, which the next replay overwrites."""


class CudaGraph:
    """One captured function without arguments.

    Args:
        pool: the memory that graphs share which never run at the same time.
    """

    def __init__(self, function: Callable[[], torch.Tensor], pool):
        # Cached blocks are of no use to the graph, which takes its memory from a pool of its own.
        gc.collect()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        for state in get_cuda_rng_tracker().get_states().values():
            if isinstance(state, torch.Generator):
                self.graph.register_generator_state(state)
        # On the stream that the model was built on: there the gradients' accumulation runs. Other threads may copy.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = function()

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.output


class Graphs:
    """What all captured functions of an engine share.

    Args:
        modules: of the model.
        group: ranks whose collectives are inside the graphs; they capture together.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], group: dist.ProcessGroup, device: torch.device):
        self.modules, self.group, self.device = list(modules), group, device
        self.functions: list[Replayed] = []
        # The memory of all graphs: only one of them ever runs, and nobody keeps what it returned.
        self.pool: Any = None

    def function(self, function: Callable[..., torch.Tensor], what: str, *, collective: bool = True) -> "Replayed":
        """`function(batch, *constants)` as it will be replayed.

        Args:
            what: it is, for the log.
            collective: whether there are collectives of the group in it.
        """
        self.functions.append(Replayed(self, function, what, collective))
        return self.functions[-1]

    @property
    def any_captured(self) -> bool:
        return any(one.graph is not None for one in self.functions)

    def capture(self, function: Callable[[], torch.Tensor], what: str) -> Replayable:
        """The function as a graph; nothing is computed.

        Raises:
            RuntimeError: it cannot be captured; what it has left behind is not to be gone on with.
        """
        if not self.any_captured:
            # A pool that graphs have left may not be entered again.
            self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        try:
            return CudaGraph(function, self.pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = error.__context__ or error
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise RuntimeError(f"{what} could not be captured ({reason}): go on with --cuda-graphs off") from error

    def drop(self) -> None:
        """Give back the memory of all graphs: the next steps run eagerly."""
        for function in self.functions:
            function.drop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def same_everywhere(self, same: bool) -> bool:
        """Whether it is so on every rank whose collectives are inside."""
        if self.group.size() == 1:
            return same
        differs = torch.tensor(int(not same), device=self.device)
        dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=self.group)
        return not differs.item()


class Replayed:
    """A function of a batch on the device: eager until nothing changes any more, then captured and replayed."""

    def __init__(self, graphs: Graphs, function: Callable[..., torch.Tensor], what: str, collective: bool):
        self.graphs, self.function, self.what, self.collective = graphs, function, what, collective
        self.seen: Hashable = None
        self.replaying = False
        self.graph: Replayable | None = None
        # Where a graph reads the batch.
        self.inputs: Batch = {}
        self.eager_steps = 0

    def begin(self, batches: list[Batch], *key: Hashable, modules: Iterable[torch.nn.Module] | None = None) -> None:
        """Before the micro-batches of a step: decide how they run.

        Args:
            key: what they depend on besides their shapes and `addresses`, on the host.
            modules: that they read; None: all of the model's.
        """
        shapes = {tuple((name, value.shape, value.dtype) for name, value in batch.items()) for batch in batches}
        now = (key, shapes, addresses(self.graphs.modules if modules is None else modules))
        alike = len(shapes) == 1 and now == self.seen
        self.replaying = self.graphs.same_everywhere(alike) if self.collective else alike
        self.seen = now
        if not self.replaying:
            if self.graph is not None:
                # With it goes what cuBLAS keeps for the stream, which the other graphs of the stream read.
                self.graphs.drop()
            self.eager_steps += 1
            if self.eager_steps == RESTLESS:
                logger.info("CUDA graphs: %s runs eagerly as long as its operands change in each step", self.what)

    def __call__(self, batch: Batch, *constants) -> torch.Tensor:
        """The output for a batch on the CPU or the device, a tensor of its own.

        Args:
            constants: further arguments, the same objects in every call since `begin` has seen something new.
        """
        if self.replaying and self.graph is None:
            self.capture(batch, *constants)
        if self.graph is None:
            return self.function(self.on_device(batch), *constants)
        for name, value in batch.items():
            self.inputs[name].copy_(value, non_blocking=True)
        return self.graph.replay().clone()

    def capture(self, batch: Batch, *constants) -> None:
        inputs = {name: torch.empty_like(value, device=self.graphs.device) for name, value in batch.items()}
        self.graph = self.graphs.capture(lambda: self.function(inputs, *constants), self.what)
        self.inputs, self.eager_steps = inputs, 0
        logger.info("CUDA graphs: %s is captured, and replayed from now on", self.what)

    def on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.graphs.device, non_blocking=True) for name, value in batch.items()}

    def drop(self) -> None:
        """Forget the graph, and what it read from."""
        self.graph, self.inputs = None, {}


@functools.cache
def own_stream(device: torch.device) -> torch.cuda.Stream:
    """One that can be captured, as a device's default stream cannot."""
    return torch.cuda.Stream(device)


def leave_default_stream(device: torch.device) -> None:
    """Make a stream that can be captured the current one, before gradients' accumulation is bound to another.

    Autograd adds a gradient up on the stream on which its parameter was first used; a capture takes no other one in.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.set_stream(own_stream(device))
