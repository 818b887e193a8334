"""A stand-in for NVIDIA's Transformer Engine in plain torch: what megatron-core calls of it, under the same names.

Norms, attention (also over context-parallel ranks) and the linears of a dense model compute; anything else is a class
that refuses to be made. Put the folder that holds this package on the path before megatron-core is imported.
"""

from transformer_engine import common, pytorch  # noqa: F401

__version__ = "2.2.0"
