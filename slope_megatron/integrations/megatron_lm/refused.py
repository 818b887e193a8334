"""Which of Megatron-LM's arguments `--slope` refuses, at which values, and what to give instead.

One row an argument, by its name in `args`. A row that no longer holds is taken out, and the name, with those that
`arguments.BESIDE` lists under it, goes to the group of `arguments` where it then belongs: a test counts them.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any


def given(value: Any) -> bool:
    """Neither None, False, zero nor empty: how nearly all of the upstream's defaults say `no`."""
    return bool(value)


def among(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def other_than(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value is not None and value not in values


def above(bound: float) -> Callable[[Any], bool]:
    return lambda value: value is not None and value > bound


def local(args: argparse.Namespace) -> bool:
    """Whether attention and norms are of the local spec, without Transformer Engine."""
    return getattr(args, "transformer_impl", "local") == "local"


@dataclasses.dataclass(frozen=True)
class Rule:
    """An argument that is refused.

    Args:
        name: in `args`.
        instead: what to give, and why the argument cannot be served.
        refused: at which values.
        when: beside which other arguments; None: always.
    """

    name: str
    instead: str
    refused: Callable[[Any], bool] = given
    when: Callable[[argparse.Namespace], bool] | None = None

    def problem(self, args: argparse.Namespace) -> str | None:
        """The sentence about a value that is refused; None: it is served, or the upstream has no such argument."""
        value = getattr(args, self.name, None)
        if not self.refused(value) or (self.when and not self.when(args)):
            return None
        return f"{self.name} is {value!r} with --slope: use {self.instead}"


NO_MATRIX = (
    "adam, sgd or lion: it treats a weight as a matrix, and packed values are none, but kept weights side by side"
)
NO_FP8 = "--slope-fp8 (and --bf16): Transformer Engine's formats never reach 2:4 products, which would run in bf16"
NO_FP4 = "--slope-fp8, or --bf16 alone: there is no FP4 product with 2:4 weights"
NO_GRAPHS = (
    "none of CUDA graphs: a graph replays what it captured, without adapters that join and column patterns that are "
    "chosen later"
)
NO_FSDP = "--use-distributed-optimizer: operands are derived from whole weights, which it scatters"
NO_XAVIER = "--init-method-std: --slope starts weights from normal numbers"
SAME_START = "no --data-parallel-random-init: every replica starts with the same weights"
NO_HYBRID = "pretrain_gpt.py with attention and MLP in every block: --slope has no rule for other mixers"
NO_EXPORT = "the script without ModelOpt: it builds a model of its own, which the hook does not reach"
NO_OFFLOAD = "--recompute-granularity: moving what 2:4 products keep for backward to the host was never tried"
OTHER_MLP = "the plain MLP: it puts linears of its own in the place of those that --slope replaces"
GROUPED = "experts one after another: it is of a grouped product, and each packed weight has products of its own"
INTERLEAVED = "gate above up: patterns and checkpoints know no other order"
WHOLE_SHARDS = "--tensor-model-parallel-size: 2:4 products want whole shards"
LOCAL_ATTENTION = "the default: the local spec's attention with --slope is torch's scaled_dot_product_attention"

RULES = (
    # Transformer Engine
    Rule(
        "transformer_impl",
        "--transformer-impl transformer_engine or local: its own linears would stay dense",
        among("inference_optimized"),
    ),
    Rule("fused_residual_rmsnorm", "no --fused-residual-rmsnorm: it is Transformer Engine's"),
    Rule("te_precision_config_file", NO_FP8),
    Rule("use_te_activation_func", "no --use-te-activation-func: it is Transformer Engine's"),
    Rule("tp_comm_overlap", "no --tp-comm-overlap: it overlaps Transformer Engine's linears, and 2:4 ones are none"),
    Rule("use_transformer_engine_op_fuser", OTHER_MLP),
    Rule("use_grouped_gemm_for_dense_mlp", OTHER_MLP),
    Rule("delay_wgrad_compute", "no --delay-wgrad-compute: 2:4 linears compute their gradients at once"),
    # Attention and norms of the local spec
    Rule("window_size", LOCAL_ATTENTION, when=local),
    Rule("softmax_type", "vanilla: --slope does not start the offsets of others", other_than("vanilla")),
    Rule("flash_attention_version", LOCAL_ATTENTION, when=local),
    Rule("dataloader_inter_document_masking", LOCAL_ATTENTION + ", causal over a sample", when=local),
    Rule("sft", "unpacked samples: " + LOCAL_ATTENTION + ", which takes no packed ones", when=local),
    Rule("qk_clip", "no --qk-clip: attention scores are never written out"),
    Rule("log_max_attention_logit", "no --log-max-attention-logit: attention scores are never written out"),
    Rule("reset_attention_mask", "no --reset-attention-mask: attention is causal over a sample, whatever its mask"),
    Rule("layernorm_zero_centered_gamma", "no --apply-layernorm-1p: torch's norms do not have it", when=local),
    # Numbers' formats
    Rule("fp8", NO_FP8),
    Rule("fp8_param_gather", NO_FP8),
    Rule("fp4", NO_FP4),
    Rule("fp4_param", NO_FP4),
    Rule("fp4_param_gather", NO_FP4),
    Rule("kitchen_config_file", NO_FP8),
    Rule("kitchen_recipe_number", NO_FP8, other_than()),
    Rule("use_kitchen_attention", NO_FP8),
    Rule("batch_invariant_mode", "no --batch-invariant-mode: 2:4 products are chosen by the number of tokens"),
    # Weights as they start
    Rule("use_mup", "the standard parametrization: --slope starts weights by --init-method-std alone"),
    Rule("init_method_xavier_uniform", NO_XAVIER),
    Rule("data_parallel_random_init", SAME_START),
    Rule("init_model_with_meta_device", "no --init-model-with-meta-device: weights are written when they are built"),
    # Layouts
    Rule(
        "overlap_param_gather_with_optimizer_step",
        "no --overlap-param-gather-with-optimizer-step: operands are made of weights that are whole after the step",
    ),
    Rule(
        "context_parallel_size",
        "1, or --transformer-impl transformer_engine: torch's attention sees one rank's part of a sequence alone",
        above(1),
        when=local,
    ),
    Rule("hybrid_context_parallel", "no --hybrid-context-parallel: attention takes no packed samples"),
    Rule(
        "tensor_parallel_num_weight_shards",
        WHOLE_SHARDS,
        # The upstream fills in the tensor-parallel size where nothing was given.
        when=lambda args: args.tensor_parallel_num_weight_shards > getattr(args, "tensor_model_parallel_size", 1),
    ),
    Rule("use_torch_fsdp2", NO_FSDP),
    Rule("use_megatron_fsdp", NO_FSDP),
    Rule("ckpt_format", "torch_dist or torch: this one is of sharded weights", among("torch_dcp", "fsdp_dtensor")),
    # Experts
    Rule("moe_latent_size", "no --moe-latent-size: its two projections would stay dense"),
    Rule("moe_use_upcycling", "a checkpoint with experts: copies of a dense MLP cannot be made of packed weights"),
    Rule("overlap_dispatch_backward_with_experts_wgrad", "nothing: 2:4 linears compute their gradients at once"),
    Rule("use_grouped_gemm_for_shared_expert", OTHER_MLP),
    Rule("moe_paged_stash", GROUPED),
    Rule("moe_single_grouped_weight", GROUPED),
    Rule("moe_single_grouped_bias", GROUPED),
    Rule("moe_use_grouped_tensor", GROUPED),
    Rule("moe_mlp_glu_interleave_size", INTERLEAVED),
    Rule("moe_shared_expert_glu_interleave_size", INTERLEAVED),
    Rule(
        "expert_tensor_parallel_num_weight_shards",
        WHOLE_SHARDS,
        when=lambda args: (
            args.expert_tensor_parallel_num_weight_shards
            > (getattr(args, "expert_tensor_parallel_size", None) or getattr(args, "tensor_model_parallel_size", 1))
        ),
    ),
    Rule("overlap_moe_expert_parallel_comm", "no --overlap-moe-expert-parallel-comm: it takes weight gradients apart"),
    # Other models
    Rule("multi_latent_attention", "attention with one projection for query, key and value: MLA's are not replaced"),
    Rule("mtp_num_layers", "none: the layers of multi-token prediction would stay dense"),
    Rule("experimental_attention_variant", NO_HYBRID),
    Rule("enable_mhc_connections", NO_HYBRID),
    Rule("heterogeneous_layers_config_path", NO_HYBRID),
    Rule("heterogeneous_layers_config_encoded_json", NO_HYBRID),
    Rule("is_hybrid_model", NO_HYBRID),
    Rule("hybrid_layer_pattern", NO_HYBRID),
    Rule("hybrid_override_pattern", NO_HYBRID),
    Rule("hybrid_attention_ratio", NO_HYBRID),
    Rule("hybrid_mlp_ratio", NO_HYBRID),
    Rule("use_legacy_models", "megatron-core's models: the hook does not reach others"),
    Rule("yaml_cfg", "flags: a model of a YAML file is not described by the arguments that --slope reads"),
    Rule("export_kd_teacher_load", NO_EXPORT),
    Rule("export_kd_cfg", NO_EXPORT),
    Rule("modelopt_enabled", NO_EXPORT),
    # The step
    Rule("optimizer", NO_MATRIX, other_than("adam", "sgd", "lion")),
    Rule("optimizer_cpu_offload", "the optimizer on the GPU: it writes weights when 2:4 operands are made of them"),
    Rule("cuda_graph_impl", NO_GRAPHS, other_than("none")),
    Rule("enable_cuda_graph", NO_GRAPHS),
    Rule("external_cuda_graph", NO_GRAPHS),
    Rule("optimizer_cuda_graph", NO_GRAPHS),
    Rule("cpu_offloading_num_layers", NO_OFFLOAD),
    Rule("fine_grained_activation_offloading", NO_OFFLOAD),
    Rule("freeze_all_layers", "no --freeze-all-layers: nothing would train"),
    Rule("perform_rl_step", "`pretrain_gpt.py`: weights are handed to an inference engine, which has no 2:4 ones"),
    Rule("ckpt_convert_format", "no conversion: it was never tried with 2:4 weights"),
)


def refusals(args: argparse.Namespace, rules: tuple[Rule, ...] = RULES) -> list[str]:
    """Settings of a Megatron script that packed linears cannot serve, each with what to give instead."""
    return [problem for rule in rules if (problem := rule.problem(args))]
