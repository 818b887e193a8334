"""What can be wrong with one node, looked at on that node. Each check returns findings; none needs another node."""

import dataclasses
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from slope_megatron.config import Config
from slope_megatron.launch.cluster import Cluster
from slope_megatron.models.counts import count, model_tensors
from slope_megatron.storage.folders import output_folder
from slope_megatron.versions import unsupported_core

GIB = 2**30
QUERY = ("name", "compute_cap", "memory.used", "ecc.errors.uncorrected.volatile.total")
# Another process's context is larger than what an idle driver holds.
IDLE_MIB = 1024
# NCCL's and the data loader's shared segments.
SHARED_MEMORY_BYTES = GIB
# Weights, patterns, fp32 master and moments of a parameter, rounded up.
CHECKPOINT_BYTES = 15


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check's outcome on one node. A failed one says what, got, rule and way out."""

    check: str
    ok: bool
    text: str


def check_node(cluster: Cluster, config: Config, master: str, vocabulary: int) -> list[Finding]:
    """All of them."""
    return [
        *check_names(master),
        *check_gpus(cluster, query_gpus()),
        *check_disk(config, vocabulary),
        *check_shared_memory(),
        *check_data(config),
        *check_megatron(),
    ]


def check_megatron() -> list[Finding]:
    """Whether `slope pretrain` builds models with the megatron-core that is installed here."""
    reason = unsupported_core()
    return [Finding("megatron-core", False, reason)] if reason else []


def check_names(master: str) -> list[Finding]:
    """This node and the first one must have addresses."""
    found = []
    for what, name in (("own name", socket.gethostname()), ("first node", master)):
        try:
            found.append(Finding("names", True, f"{what} {name} is {socket.gethostbyname(name)}"))
        except OSError as error:
            found.append(Finding("names", False, f"{what} {name!r} has no address ({error}): mend /etc/hosts or DNS"))
    return found


def query_gpus() -> list[list[str]] | str:
    """`nvidia-smi`'s answer, a list a GPU; or why there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi cannot be run: {error}"
    if result.returncode:
        return f"nvidia-smi: {(result.stdout + result.stderr).strip()}"
    return [[cell.strip() for cell in line.split(",")] for line in result.stdout.strip().splitlines()]


def check_gpus(cluster: Cluster, answer: list[list[str]] | str) -> list[Finding]:
    """Number, model, 2:4 capability, ECC errors and idleness, against the cluster file. `GPU=none`: a CPU cluster."""
    if cluster.gpu == "none":
        return [Finding("gpus", True, "the cluster file has none")]
    if isinstance(answer, str):
        return [Finding("gpus", False, f"{answer}; {cluster.gpus_per_node} x {cluster.gpu} are expected")]
    found = []
    if len(answer) != cluster.gpus_per_node:
        text = (
            f"{len(answer)} GPUs, and the cluster file says {cluster.gpus_per_node}: ask for whole nodes, or correct it"
        )
        found.append(Finding("gpus", False, text))
    for index, (name, capability, used, errors) in enumerate(answer):
        arch = int(capability.replace(".", ""))
        if arch != cluster.gpu_arch:
            text = (
                f"GPU {index} is a {name} (sm_{arch}), and the cluster file says {cluster.gpu} (sm_{cluster.gpu_arch})"
            )
            found.append(Finding("gpus", False, text))
        if cluster.sparse_24 and arch < 80:
            text = f"GPU {index} ({name}, sm_{arch}) has no 2:4 tensor cores, which start at sm_80: set SPARSE_24=no"
            found.append(Finding("2:4", False, text))
        if used.isdigit() and int(used) > IDLE_MIB:
            text = f"GPU {index} has {used} MiB in use by somebody else: end that process, or exclude the node"
            found.append(Finding("idle", False, text))
        if errors.isdigit() and int(errors) > 0:
            text = f"GPU {index} has {errors} uncorrected memory errors: exclude the node and tell the site"
            found.append(Finding("ecc", False, text))
    return found or [Finding("gpus", True, f"{len(answer)} x {answer[0][0]}, idle, without memory errors")]


def check_disk(config: Config, vocabulary: int) -> list[Finding]:
    """Room for the checkpoints that the run keeps and the one it is writing, and the right to write."""
    counts = count(model_tensors(config, vocabulary), 1)
    kept = config.train.keep_checkpoints + 1
    needed = CHECKPOINT_BYTES * counts.trained * kept
    try:
        out = output_folder(config.train.out or ".", "--out")
    except ValueError as error:
        return [Finding("disk", False, str(error))]
    folder = next(part for part in (out, *out.parents) if part.is_dir())
    free = shutil.disk_usage(folder).free
    found = []
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        found.append(Finding("disk", False, f"{folder} cannot be written ({error}): give another --out"))
    text = f"{free / GIB:.1f} GiB free in {folder}; {kept} checkpoints need {needed / GIB:.1f}"
    if free < needed:
        text += ": free some, lower --keep-checkpoints, or give another --out"
    return [*found, Finding("disk", free >= needed, text)]


def check_shared_memory(folder: str = "/dev/shm") -> list[Finding]:
    """NCCL and data loaders talk through it."""
    if not os.path.isdir(folder):
        return [Finding("shared memory", False, f"{folder} does not exist: start the container with --shm-size")]
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if free < SHARED_MEMORY_BYTES:
        text += (
            f"; {SHARED_MEMORY_BYTES / GIB:.0f} GiB are needed: remove what old jobs left there, or exclude the node"
        )
    return [Finding("shared memory", free >= SHARED_MEMORY_BYTES, text)]


def check_data(config: Config) -> list[Finding]:
    """The prepared data as this node sees it; the texts are compared between nodes."""
    folder = Path(config.data.data)
    if not config.data.data:
        return [Finding("data", False, "no data: give --data FOLDER, a folder that `slope data prepare` wrote")]
    try:
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        for name in sizes:
            with open(folder / name, "rb") as stream:
                stream.read(1)
    except OSError as error:
        text = f"{folder} cannot be read ({error.strerror}): put the data on a file system that all nodes mount"
        return [Finding("data", False, text)]
    if "manifest.json" not in sizes:
        return [Finding("data", False, f"{folder} holds no prepared data: write it with `slope data prepare`")]
    return [Finding("data", True, f"{folder}: {len(sizes)} files, {sum(sizes.values())} bytes")]
