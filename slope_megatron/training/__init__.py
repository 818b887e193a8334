"""The training step and what surrounds it: engine, optimizer groups, phases, checkpoints, metrics, faults."""
