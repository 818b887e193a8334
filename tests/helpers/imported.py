"""Imported once by the server that ranks are forked from: the frameworks, without threads or process groups."""

import deepspeed  # noqa: F401
import megatron.core.dist_checkpointing  # noqa: F401
import torch
from megatron.core.models.bert.bert_model import BertModel  # noqa: F401
from megatron.core.models.gpt import GPTModel  # noqa: F401

from slope_megatron.training import cpu_host, engine  # noqa: F401

# A pool of threads would not survive the fork.
torch.set_num_threads(1)
cpu_host.prepare()
