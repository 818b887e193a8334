"""Checkpoints and the folder of a run: written atomically, checked when read."""
