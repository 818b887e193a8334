"""Registered ops: plain tensors in and out, with schemas and fakes, each with its plain-torch twin on CPUs."""
