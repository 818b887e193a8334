"""Registered ops: plain tensors in and out, with schemas and fakes, each with a plain-torch reference for CPUs."""
