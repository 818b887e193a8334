"""Measuring which kernel runs a product: candidates, a numerics gate, times, and the choice."""
