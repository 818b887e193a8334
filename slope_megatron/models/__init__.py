"""Models from Megatron's own specs with the block linears replaced, and the same initial weights at every layout."""
