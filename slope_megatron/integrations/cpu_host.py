"""megatron-core 0.16 and DeepSpeed 0.19 on a machine without CUDA: gloo, one process a rank.

Megatron assumes CUDA here and there. Each is patched here, with its reason, and nowhere else; on a machine with
a GPU `prepare` returns at once and nothing of this runs.
"""

import contextlib
import functools
import importlib
import os

import torch

FACTORIES = ("zeros", "tensor", "empty", "ones")


@functools.cache
def prepare() -> bool:
    """Patch torch, megatron-core and DeepSpeed for CPU. Call before a model is built; a second call does nothing.

    Returns:
        whether this process runs on the CPU.
    """
    if torch.cuda.is_available():
        return False
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _import_without_compiler()
    _patch_devices()
    _patch_random_states()
    _patch_factories()
    _patch_clipping()
    _patch_deepspeed()
    return True


def _replace(owner: object, **stand_ins: object) -> None:
    """Replace some attributes of a module or a class."""
    for name, stand_in in stand_ins.items():
        setattr(owner, name, stand_in)


def _import_without_compiler() -> None:
    """Megatron decorates small pointwise functions with `torch.compile` as it is imported: here they stay as they are.

    On CPUs compiling them costs more than it gives, and importing the compiler alone takes 2 s of each rank's start.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    compile_function = torch.compile
    _replace(torch, compile=lambda function=None, **_: function or (lambda decorated: decorated))
    try:
        for module in ("models.gpt", "models.bert.bert_model", "dist_checkpointing"):
            importlib.import_module(f"megatron.core.{module}")
    finally:
        _replace(torch, compile=compile_function)


def _patch_devices() -> None:
    """`device=torch.cuda.current_device()` is everywhere in Megatron; `.cuda()` is called on tied embeddings."""
    _replace(torch.cuda, current_device=lambda: torch.device("cpu"), synchronize=lambda *_, **__: None)
    for kind in (torch.Tensor, torch.nn.Module):
        _replace(kind, cuda=lambda self, *_, **__: self)


def _patch_random_states() -> None:
    """Megatron's random-state tracker saves and restores CUDA generators: here, the CPU's."""
    from megatron.core.tensor_parallel import random as megatron_random

    def get(*_, **__) -> torch.Tensor:
        return torch.get_rng_state()

    def set_(state: torch.Tensor, *_, **__) -> None:
        torch.set_rng_state(state)

    _replace(torch.cuda, manual_seed=torch.manual_seed, get_rng_state=get, set_rng_state=set_)
    _replace(megatron_random, _get_cuda_rng_state=get, _set_cuda_rng_state=set_)

    @contextlib.contextmanager
    def fork(self, name=megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME):
        # Megatron's own logs a warning whenever the CPU generator moves, which here is always.
        if name not in self.states_:
            raise ValueError(f"random state {name!r} is unknown: call model_parallel_cuda_manual_seed first")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    _replace(megatron_random.CudaRNGStatesTracker, fork=fork)


class _TorchOnCpu:
    """The torch module as some Megatron modules see it: factories called with device="cuda" make CPU tensors."""

    def __getattr__(self, name):
        value = getattr(torch, name)
        if name not in FACTORIES:
            return value

        def factory(*arguments, **keywords):
            if str(keywords.get("device", "")).startswith("cuda"):
                keywords["device"] = "cpu"
            return value(*arguments, **keywords)

        return factory


def _patch_factories() -> None:
    """The schedules, Megatron's data parallelism and its optimizer name "cuda" literally."""
    names = (
        "pipeline_parallel.schedules",
        "tensor_parallel.data",
        "distributed.finalize_model_grads",
        "distributed.param_and_grad_buffer",
        "optimizer.optimizer",
        "optimizer.clip_grads",
        "utils",
    )
    for name in names:
        _replace(importlib.import_module(f"megatron.core.{name}"), torch=_TorchOnCpu())


def _patch_clipping() -> None:
    """Megatron's clipping asserts that gradients are CUDA tensors; torch's own does the same arithmetic."""
    optimizer = importlib.import_module("megatron.core.optimizer.optimizer")

    def clip(parameters, max_norm, total_norm, use_decoupled_grad=False):
        if use_decoupled_grad:
            raise ValueError("decoupled gradients are not supported on CPUs: leave use_precision_aware_optimizer off")
        norm = torch.as_tensor(total_norm)
        torch.nn.utils.clip_grads_with_norm_(parameters, float(max_norm), norm)

    _replace(optimizer, clip_grad_by_total_norm_fp32=clip)


def _patch_deepspeed() -> None:
    """DeepSpeed compiles a shared-memory collective inside init_distributed; a rank killed meanwhile leaves a lock file
    behind on which every later run hangs. gloo does without it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed asks for fast fp16 instructions; torch computes fp16 on any CPU, slowly.
    _replace(deepspeed.accelerator.get_accelerator(), is_fp16_supported=lambda: True)
