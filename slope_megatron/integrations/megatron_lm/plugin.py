"""2:4 layers in NVIDIA's own training scripts: what the two lines that `patches/` adds to them call.

    from slope_megatron.integrations.megatron_lm.plugin import install as install_slope
    install_slope(globals())

and `pretrain_bert.py`, before it imports a layer spec:

    from slope_megatron.integrations.megatron_lm.specs import complete_bert_specs
    complete_bert_specs()

Found by name, in core 0.16 and 0.20 alike; a name that is gone is refused with a sentence. What is done:

    megatron.training.arguments.add_megatron_arguments   the --slope flags join the parser
    GPTModel, BertModel, in the module that builds it    block linears replaced, weights the same at every TP size
    megatron.training.training, setup_model_and_optimizer and save_checkpoint
                                                         choices of kernels common to ranks, and kept beside checkpoints
    megatron.training.training.train_step                adapters join at their step; after it, operands follow weights
    megatron.training.training.evaluate                  in the phase of the steps that are done

Nothing changes without `--slope`. Megatron's own optimizer, schedule and checkpoints see ordinary, smaller parameters.
Layers watch their values (`PrunedLinear.watches_values`), for about 2 % of a product, in evaluation too: Megatron's DDP
keeps its gradients, so there is no telling whether one was used. When fused or distributed optimizers, or a checkpoint
that is loaded, write the weights is the upstream's affair, and nothing here knows for sure.
"""

import argparse
import functools
import inspect
import logging
import sys

from slope_megatron.integrations.megatron_lm.args import add_slope_arguments, slope_config_from_args
from slope_megatron.integrations.megatron_lm.arguments import unknown
from slope_megatron.integrations.megatron_lm.refused import refusals

logger = logging.getLogger(__name__)
# Where the scripts build their model: a module, or the script itself.
BUILDERS = (("gpt_builders", "GPTModel"), ("megatron.training.models.gpt", "GPTModel"), (None, "BertModel"))


def install(script: dict) -> None:
    """Hook into a script's namespace and the modules it has imported. Twice is once."""
    import megatron.training.arguments as arguments
    import megatron.training.training as training

    from slope_megatron.integrations.megatron_lm.common_choices import with_common_choices, with_saved_choices
    from slope_megatron.integrations.megatron_lm.dense_start import with_dense_start

    wrap(vars(arguments), "add_megatron_arguments", with_flags, arguments.__name__)
    wrap(vars(training), "load_checkpoint", with_dense_start, training.__name__)
    wrap(vars(training), "setup_model_and_optimizer", with_common_choices, training.__name__)
    wrap(vars(training), "save_checkpoint", with_saved_choices, training.__name__)
    wrap(vars(training), "train_step", with_phase_and_refresh, training.__name__)
    wrap(vars(training), "evaluate", with_phase, training.__name__)
    found = 0
    for module, name in BUILDERS:
        namespace = script if module is None else vars(sys.modules[module]) if module in sys.modules else {}
        if name in namespace:
            wrap(namespace, name, with_sparse_layers, module or "the script")
            found += 1
    if not found:
        raise ValueError("this script builds neither GPTModel nor BertModel by name: --slope cannot reach its model")


def wrap(namespace: dict, name: str, wrapper, where: str) -> None:
    """Wrap a function, once; the original stays reachable as `__wrapped__`."""
    if name not in namespace:
        raise ValueError(f"{where} has no {name}: this Megatron-LM is not one that patches/README.md lists")
    if not getattr(namespace[name], "slope_hook", False):
        namespace[name] = wrapper(namespace[name])
        namespace[name].slope_hook = True


def with_flags(add_megatron_arguments):
    """The parser with one group more."""

    @functools.wraps(add_megatron_arguments)
    def add(parser):
        return add_slope_arguments(add_megatron_arguments(parser))

    return add


def settings():
    """(Megatron's args, the SlopeConfig they mean), refused with all that stands against it."""
    from megatron.training import get_args

    args = get_args()
    slope = slope_config_from_args(args).with_rank_for(args.hidden_size)
    if not slope.enabled:
        return args, slope
    wrong = refusals(args) + unsupported_here(slope) + adapter_refusals(args, slope)
    if wrong:
        raise ValueError("; ".join(wrong))
    warn_of_unknown()
    return args, slope


@functools.cache
def warn_of_unknown() -> None:
    """Name the arguments that were given and that no table of ours knows: the upstream is newer, or changed."""
    import megatron.training.arguments as arguments
    from megatron.training import get_args

    parser = inspect.unwrap(arguments.add_megatron_arguments)(argparse.ArgumentParser())
    values = vars(get_args())
    new = [name for name in unknown(parser) if name in values and values[name] != parser.get_default(name)]
    if new:
        logger.warning("--slope was never tried with %s: compare a run without, or leave them out", ", ".join(new))


def adapter_refusals(args, slope) -> list[str]:
    """Settings of Megatron-LM under which adapters that are not used yet, or join, would fail."""
    fp32 = not (args.bf16 or args.fp16)
    wrong = (
        (
            args.use_distributed_optimizer and fp32,
            "--use-distributed-optimizer is on with --slope-adapter-rank in fp32: adapters cannot start anew in its "
            "shards; leave it out, or give --bf16",
        ),
        (
            getattr(args, "use_precision_aware_optimizer", False),
            "--use-precision-aware-optimizer is on with --slope-adapter-rank: adapters cannot start anew in the fp32 "
            "weights that it keeps to itself; leave it out",
        ),
        (
            # The upstream counts its steps from 1.
            (slope.adapter_start(args.train_iters or 0) or 0) + 1 in (getattr(args, "iterations_to_skip", None) or []),
            "--iterations-to-skip has the step at which adapters join, and they would not start anew: skip another, or "
            "give another --slope-lazy-fraction",
        ),
    )
    return [problem for applies, problem in wrong if applies and slope.adapter_rank]


def unsupported_here(slope) -> list[str]:
    """Settings of SLoPe that need an optimizer or schedule of ours: refused, never ignored."""
    wrong = []
    if slope.method != "slope" or slope.mode != "paper":
        wrong.append(
            f"--slope-method {slope.method} and --slope-mode {slope.mode}: baselines and pruned gradients are "
            "`slope pretrain`'s; use slope and paper"
        )
    if slope.pattern == "wanda":
        wrong.append(
            "--slope-pattern is wanda: it needs a trained model, as `slope pretrain --init-from` has; use random"
        )
    for flag, share in (("--slope-dense-start", slope.dense_start), ("--slope-dense-tail", slope.dense_tail)):
        if share:
            wrong.append(f"{flag} is {share}: the model has one form from the first step to the last; leave it out")
    for name in ("lr_multiplier", "adapter_lr_multiplier"):
        if getattr(slope, name) != 1.0:
            flag = "--slope-" + name.replace("_", "-")
            wrong.append(f"{flag} is {getattr(slope, name)}: the upstream's optimizer has one learning rate; use 1.0")
    if slope.mup:
        wrong.append("--slope-mup is on: the upstream's optimizer has one learning rate; leave it out")
    return wrong


def with_sparse_layers(model_class):
    """The model with its block linears replaced; a dense one, untouched, without `--slope`."""

    # No functools.wraps: the class's own dictionary does not belong on a function.
    def build(*positional, **keywords):
        from slope_megatron.integrations.megatron_lm.specs import refuse_no_spec, sparse_block_spec
        from slope_megatron.models.init_weights import init_weights
        from slope_megatron.models.layer_spec import pruned_modules

        args, slope = settings()
        refuse_no_spec(keywords["transformer_layer_spec"])
        if not slope.enabled:
            return model_class(*positional, **keywords)
        config, stock = keywords["config"], keywords["transformer_layer_spec"]
        keywords["transformer_layer_spec"] = sparse_block_spec(stock, slope, config, keywords.get("vp_stage"))
        # Megatron's own initialisation is left out: `init_weights` writes every parameter below.
        config.perform_initialization = False
        # Blocks differ (the first QKV is dense): checkpoints must not stack their tensors over layers.
        config.hetereogenous_dist_checkpoint = True
        model = model_class(*positional, **keywords)
        model.built_sparse = True
        if hasattr(model, "attn_mask_dimensions"):
            # BERT's mask as one row for all queries: where padding asks too, no row is all forbidden.
            model.attn_mask_dimensions = "b11s"
        for module in pruned_modules(model):
            module.idle_adapters_get_zeros = args.overlap_grad_reduce
        init_weights(
            model,
            seed=args.seed,
            init_std=args.init_method_std,
            num_layers=args.num_layers,
            embedding_std=config.embedding_init_method_std,
            norm_weight=0.0 if config.layernorm_zero_centered_gamma else 1.0,
        )
        return model

    return functools.update_wrapper(build, model_class, assigned=(), updated=())


def with_phase_and_refresh(train_step):
    """The step; before it the adapters' phase, after it the operands, with a new column pattern where that is due."""

    @functools.wraps(train_step)
    def step(forward_step_func, data_iterator, model, optimizer, *positional, **keywords):
        from slope_megatron.integrations.megatron_lm.adapters import adapter_phase

        args, slope = settings()
        if not slope.enabled:
            return train_step(forward_step_func, data_iterator, model, optimizer, *positional, **keywords)
        whole = not args.overlap_param_gather
        at = {"step": args.curr_iteration, "steps": args.train_iters, "seed": args.seed, "whole": whole}
        with adapter_phase(model, optimizer, slope, **at):
            result = train_step(forward_step_func, data_iterator, model, optimizer, *positional, **keywords)
        refresh_operands(model, slope, args.curr_iteration + 1, whole=whole)
        return result

    return step


def with_phase(evaluate):
    """An evaluation, also one without training (`--skip-train`), with the adapters that its checkpoint trained."""

    @functools.wraps(evaluate)
    def run(forward_step_func, data_iterator, model, *positional, **keywords):
        from slope_megatron.integrations.megatron_lm.adapters import use_adapters

        args, slope = settings()
        start = slope.adapter_start(args.train_iters or 0)
        if start is not None:
            # The step last made: of this run, or of the one whose checkpoint it is.
            use_adapters(model, getattr(args, "curr_iteration", args.iteration - 1) >= start)
        return evaluate(forward_step_func, data_iterator, model, *positional, **keywords)

    return run


def refresh_operands(chunks, slope, step: int, *, whole: bool = True) -> None:
    """New values into the operands, and the column pattern where its step has come.

    Args:
        chunks: the parts of the model on this rank, or the engines around them.
        step: optimizer steps made.
        whole: whether every rank has all values now; else they are gathered in the next forward, and followed there.
    Raises:
        ValueError: there is nothing packed: a dense model would train in silence.
    """
    from slope_megatron.layers.packed_weight import PackedWeight

    every = [module for chunk in chunks for module in chunk.modules()]
    modules = [module for module in every if isinstance(module, PackedWeight)]
    # A stage of a pipeline may have no block.
    if not modules and not any(getattr(module, "built_sparse", False) for module in every):
        raise ValueError(
            "--slope was given and the model has no 2:4 layer: it was built where the hook does not reach; "
            "use a version that patches/README.md lists, or leave --slope out"
        )
    interval = slope.backward_mask_interval
    choose = interval > 0 and step % interval == 0
    for module in modules:
        if not whole:
            module.values_arrive_later(choose)
        elif choose:
            module.update_column_pattern()
        else:
            module.refresh()
