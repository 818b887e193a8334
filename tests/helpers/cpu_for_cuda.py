"""Runs an upstream training script where there is no GPU: `cuda` means the CPU, NCCL means gloo.

    python cpu_for_cuda.py CHECKOUT SCRIPT flags ...      SCRIPT: a patched copy, wherever it is

Only for tests: what the upstream asks of a GPU is answered so that its own code runs unchanged.
"""

import collections
import contextlib
import os
import runpy
import sys
import types
import typing

import torch
from torch.overrides import TorchFunctionMode

from helpers.experts_on_gloo import exchange_dispatch, exchange_streams

CPU = torch.device("cpu")


def is_cuda(value) -> bool:
    text = isinstance(value, str) and value.startswith("cuda")
    return text or (isinstance(value, torch.device) and value.type == "cuda")


class CpuForCuda(TorchFunctionMode):
    """Every call of torch with its devices exchanged."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        kwargs = {key: CPU if is_cuda(value) else value for key, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        # A build for CUDA finds pinned memory worth having, as the GPU is said to be there.
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*[CPU if is_cuda(value) else value for value in args], **kwargs)


def exchange_cuda() -> None:
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.current_device = lambda: CPU
    cuda.manual_seed = torch.default_generator.manual_seed
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed_all"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.get_device_capability = lambda *_: (8, 0)
    facts = {"name": "cpu", "major": 8, "minor": 0, "total_memory": 1 << 34, "multi_processor_count": 1}
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(**facts)
    cuda.memory_stats = lambda *_, **__: collections.defaultdict(int)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, lambda *_, **__: 0)
    exchange_streams()
    for name in ("Float", "Int", "Long", "Byte", "Double", "BFloat16", "Half", "Bool"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    # torch's CUDA build would look for its accelerator, whatever torch.cuda says.
    torch.accelerator.is_available = lambda: False
    torch.nn.Module.cuda = lambda self, *_, **__: self
    start = torch.distributed.init_process_group

    def over_gloo(*positional, **keywords):
        keywords.pop("device_id", None)
        return start(*positional, **{**keywords, "backend": "gloo"})

    torch.distributed.init_process_group = over_gloo


def exchange_megatron() -> None:
    """Megatron-LM's generator of random numbers, what it would compile, and memory that it frees too early."""
    import megatron.core.datasets.utils as datasets
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.tensor_parallel.random as random

    @contextlib.contextmanager
    def fork(self, name=random._MODEL_PARALLEL_RNG_TRACKER_NAME):
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    random.CudaRNGStatesTracker.fork = fork
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # On a GPU a message is under way in the order of its stream; gloo may read the tensor later.
    schedules.deallocate_output_tensor = lambda *_: None
    schedules.custom_backward = lambda output, gradient: torch.autograd.backward(output, grad_tensors=gradient)
    with contextlib.suppress(ImportError):  # core 0.20 has none
        import megatron.legacy.fused_kernels as kernels

        kernels.load = lambda args: None
    with contextlib.suppress(ImportError):  # Megatron-DeepSpeed's core has none
        exchange_dispatch()
    # The wheel's compiled helpers serve the checkout too: python's own path finds them first where they are copied.
    datasets.compile_helpers = lambda: None


def look_at_operands() -> None:
    """Of a script with `--slope`, whose plugin is imported before it runs."""
    import slope_megatron.integrations.megatron_lm.plugin as plugin
    from helpers.observed_operands import observe

    def flag(name: str) -> int:
        return int(sys.argv[len(sys.argv) - sys.argv[::-1].index(name)])

    observe(plugin, flag("--micro-batch-size") * flag("--seq-length"))


def prepare(checkout: str) -> None:
    """Before the upstream is imported; for the rest of the process."""
    if not hasattr(typing, "override"):
        typing.override = lambda function: function
    torch.set_num_threads(1)
    sys.path.insert(0, checkout)
    exchange_cuda()
    mode = CpuForCuda()
    mode.__enter__()
    exchange_megatron()


def main(checkout: str, script: str) -> None:
    prepare(checkout)
    look_at_operands()
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:3])
