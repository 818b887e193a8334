"""Imported once by a server that ranks are forked from: the frameworks, without threads, process groups or CUDA."""

import gc
import importlib

import torch

from slope_megatron.integrations import cpu_host

# A pool of threads would not survive the fork.
torch.set_num_threads(1)
# Before Megatron, whose import it makes shorter.
cpu_host.prepare()
# torch's optimizers import dynamo when they are made.
for module in ("deepspeed", "slope_megatron.training.engine", "torch._dynamo"):
    importlib.import_module(module)
# DeepSpeed collects garbage eight times while it makes an engine: 2 s a rank if these modules are looked through.
gc.freeze()
