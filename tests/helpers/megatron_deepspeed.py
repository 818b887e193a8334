"""Runs Megatron-DeepSpeed's training script without apex, torchvision and its fused kernels; says where it stands.

python megatron_deepspeed.py CHECKOUT SCRIPT flags ...      SCRIPT: patched

On a GPU the upstream imports NVIDIA's apex, and builds softmax kernels for sm_70, which CUDA 13 has dropped. Stand-ins
in plain torch take apex's place where it is not installed; nothing is built but the index of the data (`make`, g++).
On a CPU DeepSpeed would compile a shared-memory collective first, which takes minutes: gloo does without.
"""

import faulthandler
import importlib.util
import os
import runpy
import sys
import sysconfig
import types
from pathlib import Path

import torch

# Of a run that stands still: every thread's stack on standard error.
SECONDS_BETWEEN_STACKS = 30


class LayerNormFunction:
    """apex's autograd function, by its name and signature."""

    def forward(ctx, input, weight, bias, normalized_shape, eps):
        """Only its signature is read."""

    @staticmethod
    def apply(input, weight, bias, normalized_shape, eps):
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)


def absent(*_, **__):
    raise RuntimeError("this is a stand-in for apex's kernel, which a run under DeepSpeed does not call")


APEX = {
    "apex": {},
    "apex.optimizers": {"FusedAdam": torch.optim.AdamW, "FusedSGD": torch.optim.SGD},
    "apex.multi_tensor_apply": {"multi_tensor_applier": absent},
    "apex.normalization": {"MixedFusedRMSNorm": torch.nn.RMSNorm},
    "apex.normalization.fused_layer_norm": {"FusedLayerNormAffineFunction": LayerNormFunction},
    "amp_C": {"multi_tensor_l2norm": absent, "multi_tensor_scale": absent},
    "fused_layer_norm_cuda": {},
}
TORCHVISION = {
    "torchvision": {},
    "torchvision.datasets": {"VisionDataset": object},
    "torchvision.transforms": {},
}


def stand_in(modules: dict[str, dict]) -> None:
    """Put modules with these names there, if the first of them is not installed."""
    if importlib.util.find_spec(next(iter(modules))) is not None:
        return
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)


def main(checkout: str, script: str) -> None:
    faulthandler.dump_traceback_later(SECONDS_BETWEEN_STACKS, repeat=True)
    sys.path.insert(0, checkout)
    # The upstream's `make` asks an installed pybind11 for these; torch has its headers too.
    places = (Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"])
    os.environ["CPPFLAGS"] = " ".join(f"-I{place}" for place in places)
    import transformers  # noqa: F401  looks for torchvision once, and must not find a stand-in

    stand_in(APEX)
    stand_in(TORCHVISION)
    import slope_megatron.integrations.megatron_deepspeed.plugin as plugin

    plugin.complete_deepspeed()
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import megatron.fused_kernels

    megatron.fused_kernels.load = lambda args: None
    from helpers.observed_operands import observe

    flags = sys.argv[3:]
    # Of a flag that is given twice the last counts.
    sizes = [int(flags[len(flags) - flags[::-1].index(name)]) for name in ("--micro-batch-size", "--seq-length")]
    observe(plugin, sizes[0] * sizes[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:3])
