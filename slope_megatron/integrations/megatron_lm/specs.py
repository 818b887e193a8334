"""Megatron-LM's layer specs as `--slope` needs them: of core 0.16 to 0.20, GPT's and BERT's.

Imported where a model is built: the upstream's own megatron.core is the one that counts.
"""

import copy
import functools
import logging

import megatron.core.models.bert.bert_layer_specs as bert_layer_specs
import megatron.core.transformer.moe.moe_utils as moe_utils
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from slope_megatron.config import SlopeConfig
from slope_megatron.integrations.megatron_lm.transformer_engine import norms_apart
from slope_megatron.layers.norm import own_norm
from slope_megatron.models.layer_spec import stage_specs

logger = logging.getLogger(__name__)
LOCAL = "give --transformer-impl local, and to pretrain_bert.py --spec local too"
BERT_DEFAULT = "bert_layer_with_transformer_engine_spec"


class SparseBlockSpec(TransformerBlockSubmodules):
    """One spec a block, and `submodules` of the stock one, by which BertModel chooses the shape of its mask."""

    submodules = None


def complete_bert_specs() -> None:
    """Without Transformer Engine, pretrain_bert.py cannot import the name of its default spec, even for `--spec local`.

    The name is there then, and means no spec: `refuse_no_spec` meets it with a sentence.
    """
    if not bert_layer_specs.HAVE_TE:
        vars(bert_layer_specs)[BERT_DEFAULT] = None
        logger.warning("Transformer Engine is not installed: of BERT's layer specs, only --spec local can be built")


def complete_router() -> None:
    """Without Transformer Engine, core 0.16's router asks for a name that its failed import has left out."""
    vars(moe_utils).setdefault("te_general_gemm", None)


def sparse_block_spec(stock, slope: SlopeConfig, config, vp_stage: int | None = None) -> SparseBlockSpec:
    """The specs of this pipeline stage's blocks, their linears packed where they are sparse.

    Args:
        vp_stage: which of the stage's parts, under a virtual pipeline.
    Raises:
        ValueError: a spec for all blocks already, or one whose linears are not Megatron's own.
    """
    one_for_all = not isinstance(stock, TransformerBlockSubmodules)
    stocks = [norms_apart(with_plain_mlp(spec)) for spec in ([stock] if one_for_all else stock.layer_specs)]
    for spec in stocks:
        refuse_other_linears(spec)
    if config.num_moe_experts:
        refuse_lost_gradients(config)
        complete_router()
    specs = stage_specs(stocks[0] if one_for_all else stocks, slope, config, vp_stage=vp_stage)
    # A stage may have no block.
    norm = own_norm(stocks[0].submodules.input_layernorm if one_for_all else stock.layer_norm)
    block = SparseBlockSpec(layer_specs=specs, layer_norm=norm)
    block.submodules = stock.submodules if one_for_all else None
    return block


def refuse_lost_gradients(config) -> None:
    """Refuse experts whose gradients Megatron leaves on their ranks: at EP 1 it treats them as dense weights."""
    sizes = config.expert_tensor_parallel_size, config.tensor_model_parallel_size
    if config.expert_model_parallel_size == 1 and sizes[0] != sizes[1]:
        raise ValueError(
            f"--expert-tensor-parallel-size is {sizes[0]} and --tensor-model-parallel-size {sizes[1]} without expert "
            "parallelism: Megatron would not add up the gradients of experts over tensor-parallel ranks; give "
            "--expert-model-parallel-size, or equal sizes"
        )


def refuse_no_spec(spec) -> None:
    """Refuse the stand-in of `complete_bert_specs`."""
    if spec is None:
        raise ValueError(f"the default layer spec needs Transformer Engine, which is not installed: {LOCAL}")


def refuse_other_linears(spec) -> None:
    """Refuse linears that are not Megatron's own: they may do more than a packed one in their place."""
    attention = spec.submodules.self_attention.submodules
    for linear in (attention.linear_qkv, attention.linear_proj):
        if linear not in (ColumnParallelLinear, RowParallelLinear):
            name = getattr(linear, "__name__", repr(linear))
            raise ValueError(f"the layer spec's linears are {name}, and --slope replaces Megatron's own: {LOCAL}")


def with_plain_mlp(stock):
    """From core 0.18 on, specs hold the MLP as a bound builder: turned back into the ModuleSpec that it still takes."""
    builder = stock.submodules.mlp
    if isinstance(builder, functools.partial) and hasattr(builder.func, "__self__"):
        stock = copy.deepcopy(stock)
        stock.submodules.mlp = ModuleSpec(module=builder.func.__self__, submodules=builder.keywords["submodules"])
    return stock
