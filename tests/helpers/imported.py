"""Imported once by the server that ranks are forked from: the frameworks, without threads or process groups."""

import importlib

import torch

from slope_megatron.training import cpu_host

# A pool of threads would not survive the fork.
torch.set_num_threads(1)
# Before Megatron, whose import it makes shorter.
cpu_host.prepare()
for module in ("deepspeed", "slope_megatron.training.engine"):
    importlib.import_module(module)
