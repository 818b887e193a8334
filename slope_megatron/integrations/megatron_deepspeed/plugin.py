"""2:4 layers in Megatron-DeepSpeed's `pretrain_gpt.py`: what the lines that `patches/` adds to it call.

    from slope_megatron.integrations.megatron_deepspeed import plugin as slope_plugin
    slope_plugin.complete_deepspeed()       before the script's own imports
    slope_plugin.install(globals())         after its last function

    pretrain, in the script                      the --slope flags join the parser
    ParallelTransformerLayer.__init__            a built layer's block linears give way to packed ones
    megatron.training.train_step                 after `engine.step()`, operands follow the weights

Nothing changes without `--slope`. DeepSpeed's ZeRO 1 and 2, its pipeline engine and checkpoints see ordinary, smaller
parameters, and patterns as buffers; layers watch their values, as under `megatron_plugin`. Packed values and patterns
start as in `slope pretrain`, the same at every layout; what stays dense starts as the upstream starts it.
"""

import functools
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator

from slope_megatron.config import SlopeConfig
from slope_megatron.integrations.megatron_lm.args import add_slope_arguments, slope_config_from_args
from slope_megatron.integrations.megatron_lm.plugin import refresh_operands, unsupported_here, wrap
from slope_megatron.integrations.megatron_lm.refused import (
    NO_FP8,
    NO_MATRIX,
    NO_XAVIER,
    SAME_START,
    Rule,
    above,
    among,
    refusals,
)
from slope_megatron.models.rules import initial_std, sparse_linears

logger = logging.getLogger(__name__)
NO_UNIVERSAL = "this run's own checkpoints: a universal one holds no patterns, and other patterns would be drawn"
COMPRESSION = "deepspeed.compression.compress"
# Our name of a block linear: where the upstream's layer holds it, and the module part of its canonical name.
ATTRIBUTES = {
    "linear_qkv": ("self_attention", "query_key_value"),
    "linear_proj": ("self_attention", "dense"),
    "linear_fc1": ("mlp", "dense_h_to_4h"),
    "linear_fc2": ("mlp", "dense_4h_to_h"),
}
RULES = (
    Rule(
        "transformer_impl",
        "--transformer-impl local: its own linears would stay dense",
        among("transformer_engine"),
    ),
    Rule("gradient_accumulation_fusion", "--no-gradient-accumulation-fusion: packed gradients go through autograd"),
    Rule("fp8_e4m3", NO_FP8),
    Rule("fp8_hybrid", NO_FP8),
    Rule("init_method_xavier_uniform", NO_XAVIER),
    Rule("data_parallel_random_init", SAME_START),
    Rule("num_layers_per_virtual_pipeline_stage", "stages of one piece: a virtual pipeline was never tried"),
    Rule("num_experts", "a model without experts", lambda value: max(value or [1]) > 1),
    Rule("zero_stage", "--zero-stage 1 or 2: operands are derived from values that stage 3 scatters", above(2)),
    Rule("universal_checkpoint", NO_UNIVERSAL),
    Rule("ds_sequence_parallel_fpdt", "no --ds-sequence-parallel-fpdt: it multiplies by dense weights itself"),
    Rule("enable_zbh1_pipeline", "the ordinary pipeline: zero-bubble takes dense weight gradients apart"),
    Rule("mos", "no --mos: the teacher would be built sparse"),
    Rule("kd", "no --kd: the teacher would be built sparse"),
)


def complete_deepspeed() -> None:
    """Newer DeepSpeeds have no `deepspeed.compression.compress`, which the upstream imports without needing it."""
    if sys.modules.get(COMPRESSION) or importlib.util.find_spec(COMPRESSION) is not None:
        return

    def absent(*_, **__):
        raise ValueError("this DeepSpeed has no compression: leave compression_training out of its configuration")

    module = types.ModuleType(COMPRESSION)
    vars(module).update(init_compression=absent, redundancy_clean=absent)
    sys.modules[COMPRESSION] = module
    logger.info("%s is not in this DeepSpeed: a stand-in that refuses to compress", COMPRESSION)


def install(script: dict) -> None:
    """Hook into a script's namespace and the modules it has imported, if they have the names. Twice is once."""
    import megatron.model.transformer as transformer
    import megatron.training as training

    wrap(script, "pretrain", with_flags, "the script")
    wrap(vars(training), "train_step", with_refresh, training.__name__)
    layer = getattr(transformer, "ParallelTransformerLayer", None)
    if layer is None:
        raise ValueError("megatron.model.transformer has no ParallelTransformerLayer: see patches/README.md")
    if not getattr(layer.__init__, "slope_hook", False):
        layer.__init__ = with_packed_linears(layer.__init__)
        layer.__init__.slope_hook = True


def with_flags(pretrain):
    """The same entry, with one group of flags more."""

    @functools.wraps(pretrain)
    def run(*positional, extra_args_provider=None, **keywords):
        def provider(parser):
            return add_slope_arguments(extra_args_provider(parser) if extra_args_provider else parser)

        return pretrain(*positional, extra_args_provider=provider, **keywords)

    return run


def settings():
    """(Megatron's args, the SlopeConfig they mean), refused with all that stands against it."""
    from megatron import get_args

    args = get_args()
    slope = slope_config_from_args(args)
    if not slope.enabled:
        return args, slope
    wrong = refusals(args, RULES) + unsupported_here(slope)
    if slope.adapter_rank:
        wrong.append(f"--slope-adapter-rank is {slope.adapter_rank}: lazy adapters are not served here; use 0")
    if not args.deepspeed:
        wrong.append("--deepspeed is off with --slope: give --deepspeed and a --deepspeed_config")
    wrong += configuration_problems(getattr(args, "deepspeed_config_dict", None) or {})
    if wrong:
        raise ValueError("; ".join(wrong))
    return args, slope


def configuration_problems(configuration: dict) -> list[str]:
    """Settings of a DeepSpeed configuration that packed weights cannot serve."""
    wrong = []
    kind = str((configuration.get("optimizer") or {}).get("type", ""))
    if "muon" in kind.lower():
        wrong.append(f"the DeepSpeed configuration's optimizer is {kind} with --slope: use {NO_MATRIX}")
    if (configuration.get("checkpoint") or {}).get("load_universal"):
        wrong.append(f"the DeepSpeed configuration's load_universal is on with --slope: use {NO_UNIVERSAL}")
    return wrong


def with_packed_linears(init):
    """The layer's constructor, after which its sparse linears are packed ones; dense for no longer than that."""

    @functools.wraps(init)
    def build(self, config, layer_number, *positional, **keywords):
        init(self, config, layer_number, *positional, **keywords)
        args, slope = settings()
        if slope.enabled:
            # The pipeline's layers are counted from 0, the others from 1.
            block = layer_number if type(self).__name__.endswith("Pipe") else layer_number - 1
            pack_layer(self, block, slope, args)

    return build


def pack_layer(layer, block: int, slope: SlopeConfig, args) -> None:
    """Replace the sparse linears of one built layer (counted from 0 over all stages) and initialise them."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from slope_megatron.integrations.megatron_deepspeed.linears import (
        PackedColumnParallelLinear,
        PackedRowParallelLinear,
    )

    for name in sorted(sparse_linears(slope, block)):
        holder_name, attribute = ATTRIBUTES[name]
        holder = getattr(layer, holder_name)
        dense = getattr(holder, attribute, None)
        if dense is None:
            raise ValueError(f"layer {block} has no {holder_name}.{attribute}: --slope serves self-attention and MLP")
        column = isinstance(dense, ColumnParallelLinear)
        packed_linear = PackedColumnParallelLinear if column else PackedRowParallelLinear
        packed = packed_linear(dense, slope.for_block(block)).to(dense.weight.device)
        canonical = f"decoder.layers.{block}.{holder_name}.{name}.weight"
        std = initial_std(canonical, args.init_method_std, args.num_layers)
        for region in regions(canonical, packed, gated=name == "linear_fc1" and dense.config.gated_linear_unit):
            packed.init_weight(args.seed, region, std)
        packed.update_column_pattern()
        setattr(holder, attribute, packed)


def regions(name: str, packed, gated: bool) -> Iterator:
    """Where this rank's rows lie in the whole weight; gate and up of a gated MLP lie apart there."""
    from slope_megatron.layers.packed_weight import Region

    rows, columns = packed.weight.shape[0], packed.weight_pattern.shape[1] * 8
    rank, world = packed.tp_group.rank(), packed.tp_group.size()
    parts = 2 if gated else 1
    column_cut = packed.replicated_adapter == "l"
    for part in range(parts):
        here = range(part * rows // parts, (part + 1) * rows // parts)
        first_row = part * rows * world // parts + rank * len(here) if column_cut else 0
        yield Region(
            name=name,
            local_rows=here,
            first_row=first_row,
            first_column=0 if column_cut else rank * columns,
            row_length=packed.input_size,
        )


def with_refresh(train_step):
    """The step, and after it the operands."""

    @functools.wraps(train_step)
    def step(forward_step_func, data_iterator, model, *positional, **keywords):
        result = train_step(forward_step_func, data_iterator, model, *positional, **keywords)
        args, slope = settings()
        if slope.enabled:
            refresh_operands(model, slope, args.curr_iteration + 1)
        return result

    return step
