"""Optimizers, and which parameters are in which group."""
