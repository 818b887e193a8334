"""A checkpoint of patched Megatron-LM as an export reads it, in one process, without Megatron.

    --save FOLDER   latest_checkpointed_iteration.txt, iter_0001000/{.metadata, *.distcp, common.pt}

The architecture and `--slope` are those of the arguments that lie in `common.pt`.
"""

import argparse
import functools
import logging
from pathlib import Path

from slope_megatron.config import Config, DataConfig, ModelConfig, SlopeConfig
from slope_megatron.data.fast_tokenizer import FastTokenizer
from slope_megatron.data.tokenizer import Tokenizer, load_tokenizer
from slope_megatron.export.experts_model import ExpertsModel
from slope_megatron.export.trained_model import TrainedModel
from slope_megatron.integrations.megatron_lm.args import slope_config_from_args
from slope_megatron.storage import metadata, pickled_arguments

logger = logging.getLogger(__name__)
LATEST = "latest_checkpointed_iteration.txt"
# What our models, and those of Hugging Face that we write, have none of: the values that mean its absence. An argument
# that a version does not have is absent.
ABSENT: dict[str, tuple] = {
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None,),
    "use_rope_scaling": (False,),
    "no_rope_freq": (None,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "activation_func_clamp_value": (None,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "window_size": (None,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "use_mup": (False,),
}
# The same of a mixture of experts.
ABSENT_OF_EXPERTS: dict[str, tuple] = {
    "moe_shared_expert_intermediate_size": (None,),
    "moe_latent_size": (None,),
    "moe_layer_freq": (1, "1", [1]),
    "moe_router_score_function": ("softmax",),
    "moe_router_pre_softmax": (False,),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_topk_scaling_factor": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_expert_capacity_factor": (None,),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
}


def is_saved_model(folder: Path) -> bool:
    """Whether it is what `--save` names, or the folder of one iteration in it."""
    return (folder / LATEST).is_file() or (folder / pickled_arguments.NAME).is_file()


def find_iteration(folder: Path, step: int | None = None) -> Path:
    """The folder of an iteration: the newest, or that of a step.

    Raises:
        ValueError: there is none, or none of the torch_dist format.
    """
    if (folder / LATEST).is_file():
        latest = (folder / LATEST).read_text().strip()
        if step is None and not latest.isdigit():
            raise ValueError(f"{folder / LATEST} says {latest!r}, which is no iteration: give --step")
        found = folder / f"iter_{int(latest) if step is None else step:07d}"
    elif step is None:
        found = folder
    else:
        raise ValueError(f"--step is {step} and {folder} is one iteration's folder: give the folder around it")
    if not (found / metadata.NAME).is_file() or not (found / pickled_arguments.NAME).is_file():
        raise ValueError(
            f"{found} holds no checkpoint of the torch_dist format: give an iteration that Megatron-LM saved with "
            "--ckpt-format torch_dist"
        )
    return found


class SavedModel(TrainedModel):
    """See the module's docstring.

    Args:
        folder: what `--save` named, or one iteration's folder.
        step: of the checkpoint; None: the newest.
        tokenizer: file or folder; None: what `--tokenizer-model` named, where it is still there.
    Raises:
        ValueError: no checkpoint, or a model with something that ours do not have.
    """

    def __init__(self, folder: Path | str, step: int | None = None, tokenizer: Path | None = None):
        self.folder = find_iteration(Path(folder), step)
        common = pickled_arguments.read(self.folder)
        args = common["args"]
        self.step = common["iteration"]
        slope = slope_config_from_args(args).with_rank_for(args.hidden_size)
        self.adapters_active = slope.adapters_count(args.train_iters or 0, self.step)
        self.tokenizer_path = tokenizer or saved_tokenizer(args)
        self.vocabulary = self.tokenizer.vocab_size if self.tokenizer else args.padded_vocab_size
        if self.tokenizer is None:
            logger.warning(
                "no tokenizer: the vocabulary keeps its padding, %d rows; give --tokenizer to write it too, and to "
                "leave the padding out",
                self.vocabulary,
            )
        self.model = model_config(args, self.vocabulary)
        self.config = Config(slope=slope, model=self.model, data=DataConfig(seq_length=args.seq_length))
        self.open_tensors(self.folder)
        check_packed(self, slope)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | FastTokenizer | None:
        return load_tokenizer(self.tokenizer_path) if self.tokenizer_path else None


def saved_tokenizer(args: argparse.Namespace) -> Path | None:
    """What `--tokenizer-model` named, where a file or folder of that name is here."""
    named = getattr(args, "tokenizer_model", None)
    return Path(named) if named and Path(named).exists() else None


def check_packed(model: SavedModel, slope: SlopeConfig) -> None:
    """
    Raises:
        ValueError: the arguments say `--slope` and nothing is packed, or the other way round.
    """
    packed = any(name.endswith(".weight_pattern") for name in model)
    if packed != slope.packed:
        found, said = ("packed", "dense") if packed else ("dense", "2:4")
        raise ValueError(f"{model.folder} holds a {found} model and its arguments say {said}: it is not one run's")


def model_config(args: argparse.Namespace, vocabulary: int) -> ModelConfig:
    """The architecture that Megatron-LM's arguments say.

    Raises:
        ValueError: it has something that our models do not have, each named.
    """
    experts = getattr(args, "num_experts", None)
    table = {**ABSENT, **(ABSENT_OF_EXPERTS if experts else {})}
    wrong = [
        f"--{name.replace('_', '-')} is {getattr(args, name)!r}"
        for name, absent in table.items()
        if getattr(args, name, absent[0]) not in absent
    ]
    if args.kv_channels != args.hidden_size // args.num_attention_heads:
        wrong.append(f"--kv-channels is {args.kv_channels}")
    if args.position_embedding_type not in ("learned_absolute", "rope"):
        wrong.append(f"--position-embedding-type is {args.position_embedding_type}")
    if getattr(args, "add_qkv_bias", False) and not args.add_bias_linear:
        wrong.append("--add-qkv-bias is on without biases elsewhere")
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: this cannot be exported, for no model that is written has it")
    # Megatron's fused GELU is the approximate one.
    gelu = "gelu_tanh" if args.bias_gelu_fusion else "gelu"
    values = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "activation": "silu" if args.swiglu else gelu,
        "gated_mlp": args.swiglu,
        "normalization": args.normalization,
        "qk_norm": args.qk_layernorm,
        "norm_eps": getattr(args, "layernorm_epsilon", getattr(args, "norm_epsilon", None)),
        "position": "rope" if args.position_embedding_type == "rope" else "learned",
        "max_positions": args.max_position_embeddings,
        "rotary_base": int(args.rotary_base),
        "linear_bias": args.add_bias_linear,
        "tie_embeddings": not args.untie_embeddings_and_output_weights,
        "dropout": args.hidden_dropout,
        "init_std": args.init_method_std,
        "vocab_size": vocabulary,
    }
    if not experts:
        return ModelConfig(**values)
    values["ffn_hidden_size"] = args.moe_ffn_hidden_size or args.ffn_hidden_size
    return ExpertsModel(**values, num_experts=experts, experts_per_token=args.moe_router_topk)
