"""Site facts: launch/clusters/NAME.env, which bash sources and this module reads: `KEY=value` lines."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

from slope_megatron.config import shipped
from slope_megatron.config.text_file import lines_of, read_text

# In a checkout; an installed package is given the file's path.
CLUSTERS = shipped.folder("clusters")
# generic-h100.env: nodes of H100s, wherever they are.
GENERIC = "generic-"
LINE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
LAUNCHERS = ("srun", "torchrun", "deepspeed", "mpirun")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """One site. Field names are the file's keys in lower case.

    Args:
        gpu_memory_gib: what one process can use of a GPU.
        gpu_arch: compute capability, 80 for sm_80.
        sparse_24: whether the GPU has 2:4 tensor cores.
        peak_tflops: dense peak at `dtype`, the vendor's figure; the planner's MFU is a share of it.
        memory_gbs, intra_gbs, network_gbs: GB/s of a GPU's memory, of a GPU to its peers in the node, of a node.
        bandwidth_floor_gbs: preflight fails below this all-reduce bus bandwidth; 0: no floor.
        sbatch_args: options that every job of this site needs.
        modules: what `module load` gets; empty: no module system is touched.
        nccl_env: `NAME=value` pairs, exported in jobs.
        tested: in words, what was run there.
    """

    name: str
    gpus_per_node: int
    cpus_per_node: int
    host_memory_gib: int
    gpu: str
    gpu_memory_gib: float
    gpu_arch: int
    sparse_24: bool
    dtype: str
    peak_tflops: float
    memory_gbs: float
    intra_gbs: float
    network_gbs: float
    bandwidth_floor_gbs: float
    max_nodes: int
    max_time: str
    account_required: bool
    partition: str
    sbatch_args: str
    modules: str
    scratch: str
    nccl_env: str
    launcher: str
    tested: str


def read_cluster(name: str) -> Cluster:
    """The cluster of that name, or of the file of that path; a ValueError names the key that is wrong."""
    path = Path(name) if name.endswith(".env") else CLUSTERS / f"{name}.env"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in CLUSTERS.glob("*.env"))) or "none"
        raise ValueError(f"cluster {name!r} has no file {path}: use one of {known}, or give the path of an .env file")
    values = read_values(path)
    fields = {field.name: field.type for field in dataclasses.fields(Cluster) if field.name != "name"}
    for key in values:
        if key.lower() not in fields:
            raise ValueError(f"{path}: unknown key {key}; the keys are {', '.join(map(str.upper, fields))}")
    missing = [key.upper() for key in fields if key.upper() not in values]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing: copy the line from another file of {CLUSTERS}")
    cluster = Cluster(name=path.stem, **{k: convert(path, k, kind, values[k.upper()]) for k, kind in fields.items()})
    if cluster.launcher not in LAUNCHERS:
        raise ValueError(f"{path}: LAUNCHER is {cluster.launcher!r}: it must be one of {', '.join(LAUNCHERS)}")
    return cluster


def machine(name: str | None, gpu: str | None, nodes: int | None, gpus: int | None) -> tuple[Cluster, int]:
    """The cluster of a name or of a GPU, and the number of nodes; of too few GPUs for a node, a node of those.

    Raises:
        ValueError: no such cluster or GPU, numbers that it does not have, or two arguments that say the same.
    """
    for first, second, given in (("cluster", "gpu", (name, gpu)), ("nodes", "gpus", (nodes, gpus))):
        if None not in given:
            raise ValueError(f"--{first} and --{second} are both given: one takes the other's place; give one")
    cluster = read_cluster(name or "generic-a100") if gpu is None else read_generic(gpu)
    if gpus is not None:
        return share_of_nodes(cluster, gpus)
    nodes = 1 if nodes is None else nodes
    if not 1 <= nodes <= cluster.max_nodes:
        raise ValueError(
            f"--nodes is {nodes}: {cluster.name} gives a job 1 to {cluster.max_nodes} nodes (MAX_NODES of its file)"
        )
    return cluster, nodes


def read_generic(gpu: str) -> Cluster:
    """Nodes of that GPU, anywhere: the file generic-GPU.env.

    Raises:
        ValueError: no such file; names those that are there.
    """
    known = sorted(path.stem.removeprefix(GENERIC) for path in CLUSTERS.glob(f"{GENERIC}*.env"))
    if gpu not in known:
        raise ValueError(
            f"--gpu is {gpu!r}: it must be one of {', '.join(known)}; for others write an .env file and give its path "
            "to --cluster"
        )
    return read_cluster(f"{GENERIC}{gpu}")


def share_of_nodes(cluster: Cluster, gpus: int) -> tuple[Cluster, int]:
    """The cluster and the number of its nodes that have so many GPUs; of fewer than a node's, a node with only those.

    Raises:
        ValueError: no number of nodes has them.
    """
    per_node = cluster.gpus_per_node
    nodes = max(1, gpus // per_node)
    if not 1 <= gpus <= cluster.max_nodes * per_node or (gpus > per_node and gpus % per_node):
        raise ValueError(
            f"--gpus is {gpus}: {cluster.name} has {per_node} in a node and {cluster.max_nodes} nodes for a job; give "
            f"1 to {per_node}, or a multiple of {per_node}"
        )
    return dataclasses.replace(cluster, gpus_per_node=min(gpus, per_node)), nodes


def read_values(path: Path) -> dict[str, str]:
    """`KEY=value` lines, quotes as in a shell; comments and empty lines skipped."""
    values: dict[str, str] = {}
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        try:
            words = shlex.split(match[2], comments=True) if match else None
        except ValueError:
            words = None
        if match is None or words is None or len(words) > 1:
            raise ValueError(f"{path}:{number}: {line!r} is no KEY=value: quote values that hold spaces")
        values[match[1]] = words[0] if words else ""
    return values


def convert(path: Path, key: str, kind: Any, text: str):
    """One value as its field's type."""
    try:
        if kind is bool:
            return {"yes": True, "no": False}[text]
        return kind(text)
    except (KeyError, ValueError):
        rule = "yes or no" if kind is bool else f"of type {kind.__name__}"
        raise ValueError(f"{path}: {key.upper()} is {text!r}: it must be {rule}") from None
