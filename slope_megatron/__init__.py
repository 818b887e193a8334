"""slope-megatron: 2:4 sparse pretraining from the first step (SLoPe, arXiv 2405.16325) on megatron-core and DeepSpeed.

Importing this package touches neither CUDA, Megatron nor DeepSpeed.
"""

__version__ = "0.1.0"

# The library's, in `slope_megatron.torch_layers`; imported when first asked for.
LIBRARY = ("sparsify", "densify", "before_step", "after_step", "follow_optimizer", "join_adapters", "load_sparse_state")


def __getattr__(name: str):
    if name not in LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("slope_megatron.torch_layers"), name)
