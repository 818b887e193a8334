"""Which rank is this process: one reading of the environment for every launcher.

    RANK               torchrun, deepspeed
    OMPI_COMM_WORLD_*  Open MPI, Spectrum MPI
    MV2_COMM_WORLD_*   MVAPICH2
    PMI_*              MPICH, Intel MPI, Cray MPICH
    SLURM_*            srun, and only inside a step it started
    none of them       a single process

The order matters: `mpirun` starts its daemons through srun, so its ranks inherit the daemon's SLURM_PROCID and
SLURM_NTASKS, which are those of the nodes. The batch shell of a job has SLURM_NTASKS too and is no rank at all.
"""

import dataclasses
import re
from collections.abc import Mapping, MutableMapping

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
# SLURM numbers the batch shell, the interactive shell and the like from here on; real steps count from 0.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Below the ports that Linux hands out by itself (from 32768 on).
FIRST_PORT, PORTS = 20000, 12000


@dataclasses.dataclass(frozen=True)
class Ranks:
    """One process's place among the others.

    Args:
        local_rank: number among the processes of this node.
        device: index of this process's GPU among those it sees.
        source: who started it, in words.
    """

    rank: int
    world: int
    local_rank: int
    device: int
    master_addr: str
    master_port: int
    source: str


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The names under which one launcher says the same three numbers; several names: the first that is set counts."""

    source: str
    rank: str
    world: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...] = ()


DIALECTS = (
    Dialect("torchrun or deepspeed", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    Dialect(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Dialect(
        "MVAPICH2",
        "MV2_COMM_WORLD_RANK",
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Dialect(
        "MPICH or Intel MPI",
        "PMI_RANK",
        ("PMI_SIZE",),
        # The last one: srun --mpi=pmi2, whose processes are the step's tasks.
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)
SRUN = Dialect("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",))


def resolve(environment: Mapping[str, str]) -> Ranks:
    """This process's place, from its environment alone.

    Raises:
        ValueError: names the variable, its value, the rule and the way out. Several ranks without a MASTER_ADDR are an
            error: a guessed localhost makes every node wait for its own rank 0.
    """
    dialect = speaker(environment)
    if dialect is None:
        refuse_batch_shell(environment)
        return Ranks(0, 1, 0, 0, "127.0.0.1", 0, "a single process")
    rank, world = number(environment, dialect, (dialect.rank,)), number(environment, dialect, dialect.world)
    local_rank = 0 if world == 1 else number(environment, dialect, dialect.local_rank)
    if not 0 <= rank < world:
        raise ValueError(
            f"{dialect.rank} is {rank} of {world} ranks: it must be from 0 to {world - 1}; "
            "start all ranks by one launcher"
        )
    address, port = rendezvous(environment, dialect, rank, world)
    device = 0 if one_device_per_task(environment, dialect) else local_rank
    return Ranks(rank, world, local_rank, device, address, port, dialect.source)


def export(environment: MutableMapping[str, str]) -> Ranks:
    """Resolve, and write the answer as the variables that torch, Megatron and DeepSpeed read.

    LOCAL_RANK becomes the device index: DeepSpeed and torch select the GPU by it.
    """
    found = resolve(environment)
    environment.update(
        RANK=str(found.rank),
        WORLD_SIZE=str(found.world),
        LOCAL_RANK=str(found.device),
        MASTER_ADDR=found.master_addr,
        MASTER_PORT=str(found.master_port),
    )
    return found


def speaker(environment: Mapping[str, str]) -> Dialect | None:
    """The launcher that started this process; None: none did."""
    for dialect in DIALECTS:
        if dialect.rank in environment:
            return dialect
    return SRUN if inside_step(environment) else None


def inside_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task of an ordinary step."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < FIRST_SPECIAL_STEP and "SLURM_PROCID" in environment


def refuse_batch_shell(environment: Mapping[str, str]) -> None:
    """A batch shell or `salloc` of several tasks: the other ranks would never come."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environment and tasks != "1":
        raise ValueError(
            f"SLURM_NTASKS is {tasks} and this is job {environment['SLURM_JOB_ID']}'s shell, not one of its tasks: "
            "start the ranks with `srun slope pretrain ...`, or with torchrun, deepspeed or mpirun"
        )


def number(environment: Mapping[str, str], dialect: Dialect, names: tuple[str, ...]) -> int:
    """The first of `names` that is set, as an integer."""
    name = next((name for name in names if name in environment), None)
    if name is None:
        raise ValueError(
            f"{dialect.rank} is set and {' or '.join(names)} is not: {dialect.source} sets both; "
            f"unset {dialect.rank} to run a single process, or use the launcher"
        )
    text = environment[name]
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r}: it must be a number, 0 or more; unset it, or let the launcher set it")
    return int(text)


def rendezvous(environment: Mapping[str, str], dialect: Dialect, rank: int, world: int) -> tuple[str, int]:
    """Host and port at which the ranks meet.

    Under srun both are known without help: the step's first node, and a port of the job's own.
    """
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if world == 1:
        address, port = address or "127.0.0.1", port or "0"
    elif dialect is SRUN:
        address = address or first_host(environment.get("SLURM_STEP_NODELIST", ""))
        port = port or str(job_port(environment.get("SLURM_JOB_ID", "0")))
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if not value:
            raise ValueError(
                f"{name} is not set for rank {rank} of {world} ({dialect.source}): every rank needs the same one; "
                f"export {name} before the launcher (mpirun: -x MASTER_ADDR -x MASTER_PORT): the first node's name and "
                "a free port"
            )
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"MASTER_PORT is {port!r}: it must be a port number up to 65535; leave it to launch/submit.sh")
    if address in LOCAL_HOSTS and several_nodes(environment, dialect, world):
        raise ValueError(
            f"MASTER_ADDR is {address} while the {world} ranks are on several nodes: each node would wait for itself; "
            "export the name of the first node"
        )
    return address, int(port)


def several_nodes(environment: Mapping[str, str], dialect: Dialect, world: int) -> bool:
    """Whether the launcher says that the ranks are spread over nodes; False where it does not say."""
    if dialect is SRUN:
        return environment.get("SLURM_STEP_NUM_NODES", "1") != "1"
    here = next((environment[name] for name in dialect.local_world if name in environment), str(world))
    return here.isdigit() and int(here) < world


def one_device_per_task(environment: Mapping[str, str], dialect: Dialect) -> bool:
    """`srun --gpus-per-task=1` shows each task its own GPU alone, as device 0."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return dialect is SRUN and visible != "" and "," not in visible


def first_host(nodelist: str) -> str:
    """`c[301-302,7],ng1` -> `c301`: the first name of SLURM's short form."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def job_port(job_id: str) -> int:
    """A port that two jobs on one node do not share, unless their numbers differ by a multiple of `PORTS`."""
    return FIRST_PORT + (int(job_id) if job_id.isdigit() else 0) % PORTS
