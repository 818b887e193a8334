"""`--slope` in Megatron-DeepSpeed's scripts."""
