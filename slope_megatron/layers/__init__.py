"""Tensor-parallel SLoPe linears in Megatron's constructor dialect."""
