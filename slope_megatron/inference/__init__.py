"""Decoders that were trained 2:4, in plain torch: no Megatron, no DeepSpeed."""
