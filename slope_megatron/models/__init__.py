"""Models from Megatron's own specs with the block linears replaced, and the canonical fill of every parameter."""
