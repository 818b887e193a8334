"""Which of the upstream's own training configurations `--slope` takes, as they stand and after a few changed flags.

    python tests/helpers/upstream_configurations.py      the table of patches/README.md

`megatron_lm_configurations.json` has what each configuration sets of the arguments that count (`upstream_facts`).
"""

import argparse
import collections
import dataclasses
import itertools
import json

from helpers.upstream_facts import CONFIGURATIONS
from slope_megatron.integrations.megatron_lm.arguments import BESIDE, names
from slope_megatron.integrations.megatron_lm.refused import RULES, Rule, refusals

# What the upstream's parser has where a configuration says nothing, of arguments that are read here.
DEFAULTS = {"transformer_impl": "transformer_engine", "ckpt_format": "torch_dist", "optimizer": "adam"}


# What is given instead of flags that are refused, each where a configuration has them: (words, the values it sets).
CHANGES = (
    ("`--slope-fp8` instead of `--fp8-format` and its kin", {"fp8": None, "fp8_param_gather": False}),
    (
        "`--use-distributed-optimizer` instead of either FSDP, with `torch_dist` checkpoints",
        {"use_megatron_fsdp": False, "use_torch_fsdp2": False, "ckpt_format": "torch_dist"},
    ),
    ("`--optimizer adam` instead of Muon", {"optimizer": "adam"}),
    ("no `--tp-comm-overlap`", {"tp_comm_overlap": False}),
)


def configurations() -> dict[str, dict]:
    """Name: what it sets."""
    groups = json.loads(CONFIGURATIONS.read_text(encoding="utf-8"))
    return {name: values for alike, values in groups for name in alike}


def problems(values: dict, rules: tuple[Rule, ...] = RULES) -> list[str]:
    """The arguments for which `--slope` refuses a configuration."""
    args = argparse.Namespace(**{**DEFAULTS, **values})
    return [text.split(" is ")[0] for text in refusals(args, rules)]


def changed(values: dict, rules: tuple[Rule, ...] = RULES, count: int = len(CHANGES)) -> dict:
    """The configuration after those of the first `count` changes that it needs."""
    for _, instead in CHANGES[:count]:
        if not set(instead).isdisjoint(problems(values, rules)):
            values = {**values, **instead}
    return values


def passed(rules: tuple[Rule, ...] = RULES) -> list[int]:
    """How many configurations pass as they stand, after the first change, after the first two, ..."""
    counts = range(len(CHANGES) + 1)
    every = configurations().values()
    return [sum(not problems(changed(values, rules, count), rules) for values in every) for count in counts]


# Flags whose arguments have other names.
FLAGS = {
    "add_bias_linear": "--disable-bias-linear",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "microbatch_group_size_per_vp_stage": "--microbatch-group-size-per-virtual-pipeline-stage",
}
# What two steps on a CPU cannot show, or what the toy's own flags say.
LEFT_OUT = {"async_save", "ckpt_format", "dist_ckpt_optim_fully_reshardable", "gradient_accumulation_fusion"}
LEFT_OUT |= {"cp_comm_type", "hierarchical_context_parallel_sizes", *names(BESIDE)}
# The same model and step otherwise: with these or without, up to rounding.
LAYOUT = {
    *("context_parallel_size", "tensor_model_parallel_size", "sequence_parallel"),
    *("pipeline_model_parallel_size", "use_tp_pp_dp_mapping"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
    *("microbatch_group_size_per_vp_stage", "use_distributed_optimizer", "num_distributed_optimizer_instances"),
    *("overlap_grad_reduce", "overlap_param_gather", "ddp_average_in_collective"),
    *("recompute_granularity", "recompute_method", "recompute_modules", "recompute_num_layers"),
    *("attention_backend", "apply_query_key_layer_scaling", "deterministic_mode", "cross_entropy_loss_fusion"),
    "transformer_impl",
}
TOY = """
    --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --seed 7
    --micro-batch-size 1 --global-batch-size 8 --train-iters 2 --lr 3e-3 --min-lr 3e-3 --lr-decay-style constant
    --log-interval 1 --eval-iters 0 --eval-interval 1000 --attention-dropout 0 --hidden-dropout 0 --num-workers 0
    --initial-loss-scale 1024 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --make-vocab-size-divisible-by 64
    --no-create-attention-mask-in-dataloader --no-gradient-accumulation-fusion --no-persist-layer-norm
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion --no-rope-fusion
    --distributed-backend gloo --slope
""".split()


@dataclasses.dataclass(frozen=True, order=True)
class Toy:
    """A configuration's combination of features, small: on eight ranks at most.

    Args:
        world: ranks.
        flags: of the upstream's script, without `TOY`.
        model: those of them that say what is trained, without layout.
    """

    world: int
    flags: tuple[str, ...]
    model: tuple[str, ...]


def toy(values: dict) -> Toy:
    """At most 2 ranks each of tensor, pipeline, context and data parallelism; layers as the stages want them."""
    kept = {name: value for name, value in values.items() if name not in LEFT_OUT}
    tensor = min(kept.pop("tensor_model_parallel_size", 1), 2)
    pipeline = min(kept.pop("pipeline_model_parallel_size", 1), 2)
    context = min(kept.pop("context_parallel_size", 1), 2)
    replicates = {"use_distributed_optimizer", "overlap_grad_reduce", "num_distributed_optimizer_instances"}
    data = 1 if replicates.isdisjoint(kept) or tensor * pipeline * context > 2 else 2
    chunks = {"num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"} & set(kept)
    if pipeline > 1 and chunks:
        kept |= {"num_layers_per_virtual_pipeline_stage": 1}
        kept.pop("num_virtual_stages_per_pipeline_rank", None)
    if data == 1:
        kept.pop("num_distributed_optimizer_instances", None)
    kept |= {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    kept |= {"context_parallel_size": context} if context > 1 else {}
    kept |= {"num_layers": 4 if pipeline > 1 else 2}
    if "group_query_attention" in kept:
        kept["num_query_groups"] = 2
    flags = {name: flags_of(name, value) for name, value in sorted(kept.items())}
    model = [words for name, words in flags.items() if name not in LAYOUT]
    every, own = (tuple(itertools.chain.from_iterable(words)) for words in (flags.values(), model))
    return Toy(tensor * pipeline * context * data, every, own)


def flags_of(name: str, value) -> list[str]:
    """An argument as flags; numbers of stages, layers and replicas as small as the toy."""
    flag = FLAGS.get(name, "--" + name.replace("_", "-"))
    if isinstance(value, bool):
        return [flag] if value or name in FLAGS else []
    if name in ("microbatch_group_size_per_vp_stage", "recompute_num_layers", "num_distributed_optimizer_instances"):
        value = min(value, 2)
    return [flag, *map(str, value if isinstance(value, list) else [value])] if value is not None else []


def combinations() -> dict[Toy, list[str]]:
    """The distinct toys of all configurations without experts that pass, each with their names."""
    found: dict[Toy, list[str]] = {}
    for name, values in configurations().items():
        if not problems(changed(values)) and "num_experts" not in values:
            found.setdefault(toy(changed(values)), []).append(name)
    return dict(sorted(found.items()))


def table() -> str:
    """Markdown: how many pass, by the changes that they need, and what stands against the others."""
    steps = ["as they stand", *(words for words, _ in CHANGES)]
    lines = [f"| {len(configurations())} configurations | pass |", "| --- | --- |"]
    lines += [f"| {words} | {count} |" for words, count in zip(steps, passed(), strict=True)]
    against = collections.Counter(name for values in configurations().values() for name in problems(changed(values)))
    refused = ", ".join(f"`{name}` {count}" for name, count in against.most_common())
    return "\n".join([*lines, "", f"Refused after all changes, by argument (some have several): {refused}."])


if __name__ == "__main__":
    print(table())
