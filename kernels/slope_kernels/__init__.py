"""Kernels of slope-megatron: imports torch, triton and CUDA libraries only. Nothing compiles at import."""
