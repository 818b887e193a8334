"""`slope preflight`: are these nodes fit for the run? One task a node, less than a minute."""

import argparse
import os
import sys

from slope_megatron.cli.parser import manual
from slope_megatron.config import add_config_arguments, read_config

EPILOG = """\
example (launch/pretrain.sbatch does this before each attempt):
  srun --ntasks-per-node=1 slope preflight --cluster narval --config run.yaml --data corpus --out runs/1
"""
CODES = """\
exit codes:
    0  all nodes are ready
    1  some are not: named, with the `--exclude` to use
    2  bad input: one sentence says what
"""


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "preflight",
        help="check the nodes of a job before the run: one task a node",
        description="Names, ports, GPUs, 2:4 units, disk, shared memory, data, versions and all-reduce of every node.",
        usage="slope preflight --cluster NAME [--config YAML ...] [OPTION ...]",
        epilog=manual(EPILOG, CODES),
    )
    add = parser.add_argument
    add("--cluster", required=True, help="name in launch/clusters, or path of an .env file: what the nodes should be")
    add("--patience", type=float, default=45.0, help="seconds to wait for a node (default: %(default)s)")
    add("--no-bandwidth", action="store_true", help="leave the all-reduces out")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from slope_megatron.cli.plan import read_vocabulary
    from slope_megatron.launch.cluster import read_cluster
    from slope_megatron.launch.ranks import resolve
    from slope_megatron.preflight import node_checks, preflight
    from slope_megatron.versions import versions

    arguments.vocabulary = None
    config, _ = read_config(arguments)
    cluster = read_cluster(arguments.cluster)
    if arguments.patience <= 0:
        raise ValueError(f"--patience is {arguments.patience}: it must be a positive number of seconds")
    ranks = resolve(os.environ)
    findings = node_checks.check_node(cluster, config, ranks.master_addr, read_vocabulary(arguments, config))
    mine = preflight.Report(preflight.node_name(os.environ), findings, versions())
    if ranks.world == 1:
        if not arguments.no_bandwidth:
            mine.findings.extend(within(cluster))
        text, bad = preflight.failure_report([mine])
        print("\n".join([text, *measured(mine)]), file=sys.stderr)
        return 1 if bad else 0
    return together(arguments, cluster, ranks, mine)


def measured(report) -> list[str]:
    """A line for each all-reduce of a node."""
    return [f"preflight: all-reduce, {finding.text}" for finding in report.findings if finding.check == "all-reduce"]


def within(cluster) -> list:
    """The all-reduce inside this node, where there are GPUs."""
    from slope_megatron.preflight import bandwidth

    return [] if cluster.gpu == "none" else bandwidth.within_node(cluster.bandwidth_floor_gbs)


def together(arguments, cluster, ranks, mine) -> int:
    """Two rounds: each node by itself, then, if all are sound, all at once."""
    from slope_megatron.preflight import bandwidth, preflight

    seconds = arguments.patience
    names = preflight.node_names(os.environ, ranks.world)
    store = preflight.open_store(ranks, seconds)
    reports = preflight.compare(preflight.collect(store, mine, ranks, names, seconds))
    text, bad = preflight.failure_report(reports)
    go = preflight.settle(store, ranks, "first", ",".join(bad) or "ready", 2 * seconds)
    if go == "ready" and not arguments.no_bandwidth:
        mine.findings.extend(within(cluster))
        mine.findings.extend(bandwidth.across_nodes(store, ranks, cluster.bandwidth_floor_gbs, seconds))
        store.set(f"bandwidth/{ranks.rank}", mine.to_json())
        if ranks.rank == 0:
            keys = [f"bandwidth/{rank}" for rank in range(ranks.world)]
            reports = [preflight.Report.from_json(store.get(key).decode()) for key in keys]
            text, bad = preflight.failure_report(reports)
        go = preflight.settle(store, ranks, "second", ",".join(bad) or "ready", 2 * seconds)
    if ranks.rank == 0:
        print("\n".join([text, *measured(reports[0])]), file=sys.stderr)
    preflight.leave(store, ranks, 5.0)
    return 0 if go == "ready" else 1
