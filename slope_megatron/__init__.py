"""slope-megatron: 2:4 sparse pretraining from the first step (SLoPe, arXiv 2405.16325) on megatron-core and DeepSpeed.

Importing this package touches neither CUDA, Megatron nor DeepSpeed.
"""

__version__ = "0.1.0"
