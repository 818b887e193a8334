"""`--slope` in Megatron-LM's scripts."""
