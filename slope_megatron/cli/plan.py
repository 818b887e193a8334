"""`slope plan`: which layout, how many nodes, how much memory, how long a step."""

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from slope_megatron.cli.parser import manual
from slope_megatron.config import add_config_arguments, read_config
from slope_megatron.config.json_file import read_json
from slope_megatron.storage import whole

logger = logging.getLogger(__name__)
STATED_MFU = 0.4
USAGE = "slope plan [--cluster NAME | --gpu NAME] [--nodes INT | --gpus INT] [--config YAML ...] [OPTION ...]"
CODES = """\
exit codes:
    0  done; where no layout fits, the table says so; --check agrees
    1  --check or --check-build: plan and measurement differ by more than 2 %
    2  bad input, no layout is possible, or with --flags none fits: one sentence says why
"""
EPILOG = """\
examples:
  slope plan --gpus 1 --gpu h200 --config launch/models/llama-3-8b.yaml --seq-length 8192 --global-batch-size 4
  slope plan --cluster narval --nodes 8 --config launch/models/opt-66b.yaml --global-batch-size 512
  slope plan --cluster lonestar6 --nodes 8 --config launch/models/opt-66b.yaml --global-batch-size 384 --gradients bf16
  slope plan --cluster narval --nodes 1 --config run.yaml --check runs/small

Memory is counted from the configuration; times are estimates from measured products (--rates) or a stated MFU.
"""


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "plan",
        help="memory, nodes and time of every layout on a cluster, dense and 2:4",
        description="Count memory and estimate time for every TP x PP x DP x ZeRO that divides, and recommend one.",
        usage=USAGE,
        epilog=manual(EPILOG, CODES),
    )
    add = parser.add_argument
    add("--cluster", help="name in launch/clusters, or path of an .env file (default: generic-a100)")
    add(
        "--gpu", metavar="NAME", help="instead of --cluster: a100, h100 or h200, nodes of 8 (launch/clusters/generic-*)"
    )
    add("--nodes", type=int, help="nodes of the job (default: 1)")
    add("--gpus", type=int, help="instead of --nodes: the GPUs of the job, some of one node or all of several")
    add("--vocabulary", type=int, help="tokens before padding; default: the model's or the data's, else 50272 (OPT's)")
    add(
        "--rates",
        type=Path,
        metavar="CSV",
        help="products measured by `slope bench gemm` on this kind of GPU; default: this repository's own where they "
        "are of the same architecture, unless --mfu is given",
    )
    add(
        "--mfu",
        type=float,
        help=f"without --rates: the dense step's share of peak, assumed (default: {STATED_MFU})",
    )
    add(
        "--sparse-speedup",
        type=float,
        default=1.3,
        help="without --rates: of a 2:4 product, assumed (default: %(default)s)",
    )
    add("--gradients", default="fp32", choices=("fp32", "bf16"), help="gradient accumulation (default: %(default)s)")
    add(
        "--plan-backend",
        default="kernels",
        choices=("kernels", "cutlass", "reference"),
        help="operands held (default: %(default)s)",
    )
    add("--adamw", default="fused", choices=("foreach", "fused"), help="form of AdamW (default: %(default)s)")
    add("--offload", action="store_true", help="optimizer state in host memory")
    add("--find-nodes", action="store_true", help="also: the fewest nodes for dense and for 2:4")
    add("--json", type=Path, metavar="FILE", help="write every row as JSON")
    add("--png", type=Path, metavar="FILE", help="draw the fastest layouts")
    add("--flags", action="store_true", help="print nothing but the recommended layout's flags (launch/submit.sh)")
    add(
        "--print-deepspeed-config",
        action="store_true",
        help="print nothing but DeepSpeed's JSON of the recommended layout (or of the one that flags fix), as "
        "`slope pretrain` makes it",
    )
    add("--check", type=Path, metavar="RUN", help="compare the state bytes with those that this finished run measured")
    add("--check-build", action="store_true", help="compare the parameters with the model built on the meta device")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def read_vocabulary(arguments, config) -> int:
    """Given, or as training takes it: the model's own, else the prepared data's. Without either, OPT's."""
    if arguments.vocabulary or config.model.vocab_size:
        return arguments.vocabulary or config.model.vocab_size
    manifest = Path(config.data.data) / "manifest.json"
    if config.data.data and manifest.is_file():
        return read_json(manifest, "prepare the data again, or give --vocabulary", holds=("vocab_size",))["vocab_size"]
    if config.data.data:
        logger.warning("--data %s holds no manifest.json here: OPT's 50272 tokens are assumed", config.data.data)
    return 50272


def asked_layout(config, origins: dict[str, str]):
    """What flags or files fix of the layout; the rest is free."""
    from slope_megatron.planner.layout import FIELDS, Layout

    fixed: dict[str, Any] = {"tensor": 0, "pipeline": 0, "data": 0, "zero": 0, "recompute": ""}
    for name, field in {"tensor": "tensor_parallel", **{name: field for name, (field, _) in FIELDS.items()}}.items():
        if f"parallel.{field}" in origins:
            fixed[name] = getattr(config.parallel, field)
    return Layout(**fixed)


def question(arguments, config, cluster):
    """The planner's input.

    Raises:
        ValueError: a number that makes no sense.
    """
    from slope_megatron.planner.plan import Question
    from slope_megatron.planner.speed import Rates, own_rates, read_rates

    mfu = STATED_MFU if arguments.mfu is None else arguments.mfu
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu is {arguments.mfu}: it is a share of the GPU's peak, more than 0 and at most 1")
    if not 0 < arguments.sparse_speedup < math.inf:
        raise ValueError(f"--sparse-speedup is {arguments.sparse_speedup}: it must be a positive number")
    if arguments.vocabulary is not None and arguments.vocabulary < 1:
        raise ValueError(f"--vocabulary is {arguments.vocabulary}: it must be a number of tokens from 1 on")
    for flag, path in (("--json", arguments.json), ("--png", arguments.png)):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"{flag} {path}: there is no folder {path.absolute().parent}; make it first")
        if path and path.is_dir():
            raise ValueError(f"{flag} {path} is a folder: give a file in it")
    path = arguments.rates or (own_rates(cluster.gpu_arch) if arguments.mfu is None else None)
    rates = Rates(read_rates(path) if path else (), mfu, arguments.sparse_speedup, str(path or ""))
    if arguments.vocabulary:
        # A model's own vocabulary goes before any other: here the flag's is its own.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=arguments.vocabulary))
    return Question(
        config,
        read_vocabulary(arguments, config),
        cluster,
        rates,
        gradients=arguments.gradients,
        backend=arguments.plan_backend,
        offload=arguments.offload,
        fused=arguments.adamw == "fused",
    )


def run(arguments: argparse.Namespace) -> int:
    from slope_megatron.launch.cluster import machine
    from slope_megatron.planner import plan

    config, origins = read_config(arguments)
    if arguments.check or arguments.check_build:
        return check(arguments, config)
    cluster, nodes = machine(arguments.cluster, arguments.gpu, arguments.nodes, arguments.gpus)
    asked = question(arguments, config, cluster)
    only = asked_layout(config, origins)
    found = plan.rows(asked, nodes, only)
    kind = "sparse" if config.slope.enabled else "dense"
    if not found:
        raise ValueError(refusals(asked, nodes, only))
    if arguments.flags:
        best, why = plan.recommend(found, kind, asked.name(kind))
        print(" ".join(best.layout.flags()))
        print(f"{best.layout}, {best.gib:.1f} GiB a GPU, bubble {best.bubble:.1%}: {why}", file=sys.stderr)
        return 0
    if arguments.print_deepspeed_config:
        best, _ = plan.recommend(found, kind, asked.name(kind))
        print(json.dumps(deepspeed_json(config, best.layout), indent=2))
        return 0
    show(arguments, asked, nodes, found)
    return 0


def deepspeed_json(config, layout) -> dict:
    """What the engine will hand to DeepSpeed; `--dtype auto` means bf16, as on GPUs."""
    import torch

    # DeepSpeed greets on standard output, where only the JSON belongs.
    with contextlib.redirect_stdout(sys.stderr):
        from slope_megatron.training.zero.partitions import deepspeed_config

    parallel = dataclasses.replace(
        config.parallel,
        tensor_parallel=layout.tensor,
        pipeline_parallel=layout.pipeline,
        sequence_parallel=layout.sequence_parallel,
        zero_stage=layout.zero,
    )
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(config.train.dtype, torch.bfloat16)
    return deepspeed_config(dataclasses.replace(config, parallel=parallel), dtype, layout.data)


def refusals(asked, nodes: int, only) -> str:
    """Why no layout is left: the first reason against one that was asked for."""
    from slope_megatron.planner import plan
    from slope_megatron.planner.layout import layouts

    per_node = asked.cluster.gpus_per_node
    gpus = nodes * per_node
    reasons = [no for layout, no in layouts(asked.config, gpus, per_node) if plan.matches(layout, only) and no]
    if not reasons:
        wanted = ", ".join(f"{key} {value}" for key, value in vars(only).items() if value)
        return (
            f"no layout of {nodes} x {per_node} = {gpus} GPUs has {wanted}: TP x PP x DP must be {gpus}; change --nodes"
        )
    return f"no layout of {gpus} GPUs is possible: {reasons[0]}"


def show(arguments, asked, nodes: int, found) -> None:
    from slope_megatron.planner import plan

    cluster, data = asked.cluster, asked.config.data
    tokens = data.global_batch_size * data.seq_length
    print(
        f"{cluster.name}: {nodes} nodes x {cluster.gpus_per_node} {cluster.gpu} "
        f"({cluster.gpu_memory_gib} GiB), {asked.dtype}, {asked.gradients} gradients, "
        f"global batch {data.global_batch_size} x {data.seq_length} tokens"
    )
    rates = asked.rates
    source = (
        f"products of {rates.source}" if rates.measured else f"assumed: MFU {rates.mfu}, 2:4 x{rates.sparse_speedup}"
    )
    print(f"times are estimates; {source}")
    if asked.lacks_pruned_wgrad:
        print(
            f"mode full: wgrad counts as dense, as in mode paper: the 2:4 metadata of sm_{cluster.gpu_arch} is not "
            "known, and no dY is pruned there"
        )
    print()
    print(plan.table(found, tokens, asked.name("sparse")))
    for kind in plan.KINDS:
        name = asked.name(kind)
        try:
            best, why = plan.recommend(found, kind, asked.name(kind))
            print(f"\n{name}: take {best.layout}: {why}\n  slope pretrain flags: {' '.join(best.layout.flags())}")
            parts = ", ".join(f"{part} {size / 2**30:.1f}" for part, size in best.bytes.items())
            print(f"  {best.gib:.1f} GiB on the fullest GPU: {parts}")
        except ValueError as error:
            print(f"\n{name}: {error}")
        if arguments.find_nodes:
            needed = plan.nodes_needed(asked, kind)
            text = f"{needed[0]} nodes ({needed[1].layout})" if needed else f"more than {cluster.max_nodes} nodes"
            print(f"  the fewest, any layout: {text}")
    write_files(arguments, asked, nodes, found)


def write_files(arguments, asked, nodes: int, found) -> None:
    if arguments.json:
        tokens = asked.config.data.global_batch_size * asked.config.data.seq_length
        rows = [{**dataclasses.asdict(row), "gib": row.gib, "tokens_per_step": tokens} for row in found]
        whole.write_json(arguments.json, rows)
    if arguments.png:
        from slope_megatron.planner.plot import draw

        data = asked.config.data
        title = (
            f"{' + '.join(map(str, arguments.config)) or 'the model of the flags'} on {asked.cluster.name}, "
            f"{nodes} nodes, {asked.gradients} gradients, "
            f"global batch {data.global_batch_size} x {data.seq_length} tokens"
        )
        draw(arguments.png, found, asked.cluster.gpu_memory_gib, title)


def check(arguments, config) -> int:
    """Planner against reality; exit code 1 when they differ by more than 2 %."""
    from slope_megatron.planner import meta_build, state_check

    found = []
    if arguments.check:
        config, summary = state_check.read_run(arguments.check)
        found += state_check.compare_with_run(config, summary, read_vocabulary(arguments, config))
    if arguments.check_build:
        tensor, vocabulary = config.parallel.tensor_parallel, read_vocabulary(arguments, config)
        built = meta_build.parameters(config, vocabulary)
        found += state_check.compare_with_build(config, vocabulary, tensor, built)
    print(state_check.report(found))
    return 0 if all(entry.close for entry in found) else 1
