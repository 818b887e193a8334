"""Imported once by a server that ranks are forked from: the frameworks, without threads, process groups or CUDA."""

import gc
import importlib

import torch

from slope_megatron import cli
from slope_megatron.integrations import cpu_host

# A pool of threads would not survive the fork.
torch.set_num_threads(1)
# Before Megatron, whose import it makes shorter.
cpu_host.prepare()
# What each rank and command would import anew, for 0.3 s: pytest for the tests' own modules; what DeepSpeed's engine
# and torch's optimizers import when they are made.
for module in (
    "pytest",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "slope_megatron.training.pretrain",
):
    importlib.import_module(module)
cli.build_parser()
# DeepSpeed collects garbage eight times while it makes an engine: 2 s a rank if these modules are looked through.
gc.freeze()
