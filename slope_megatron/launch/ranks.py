"""Which rank is this process: one reading of the environment for every launcher.

    RANK               torchrun, deepspeed
    OMPI_COMM_WORLD_*  Open MPI, Spectrum MPI
    MV2_COMM_WORLD_*   MVAPICH2
    PMI_*              MPICH, Intel MPI, Cray MPICH; and srun --mpi=pmi2, which counts as srun
    SLURM_*            srun, and only inside a step it started (`slurm`)
    none of them       a single process

The order matters: `mpirun` starts its daemons through srun, so its ranks inherit the daemon's SLURM_PROCID and
SLURM_NTASKS, which are those of the nodes. The batch shell of a job has SLURM_NTASKS too and is no rank at all.

Variables outlive what set them, in a shell's environment. Where two launchers number the same processes and do not
agree, one of them is long gone: that is refused (`refuse_contradiction`).
"""

import dataclasses
import itertools
from collections.abc import Mapping, MutableMapping

from slope_megatron.launch import slurm
from slope_megatron.launch.slurm import first_host, inside_step, job_port

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
# One of these is set by torchrun and deepspeed for each process they start, beside RANK; whoever exports RANK by hand
# sets neither.
SIGNATURES = ("TORCHELASTIC_RUN_ID", "LOCAL_SIZE")
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """One process's numbers among the others.

    Args:
        local_rank: number among the processes of this node.
        device: index of this process's GPU among those it sees.
        source: who started it, in words.
        local_world: processes of this node; None: the launcher does not say.
        variable: the one that holds the rank; empty for a single process.
    """

    rank: int
    world: int
    local_rank: int
    device: int
    master_addr: str
    master_port: int
    source: str
    local_world: int | None = dataclasses.field(default=None, compare=False)
    variable: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The names under which one launcher says the same three numbers; several names: the first that is set counts."""

    source: str
    rank: str
    world: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...] = ()


def mpi(source: str, prefix: str) -> Dialect:
    """Of an MPI that gives all its variables one prefix."""
    names = ((f"{prefix}_{name}",) for name in ("SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return Dialect(source, f"{prefix}_RANK", *names)


DIALECTS = (
    Dialect("torchrun or deepspeed", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    mpi("Open MPI", "OMPI_COMM_WORLD"),
    mpi("MVAPICH2", "MV2_COMM_WORLD"),
    Dialect(
        "MPICH or Intel MPI",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)
PMI = DIALECTS[-1]
SRUN = Dialect("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",))


def resolve(environment: Mapping[str, str]) -> Ranks:
    """This process's numbers, from its environment alone.

    Raises:
        ValueError: names the variable, its value, the rule and the way out. Several ranks without a MASTER_ADDR are an
            error: a guessed localhost makes every node wait for its own rank 0.
    """
    dialect = speaker(environment)
    if dialect in (None, SRUN):
        slurm.refuse_shell(environment)
    if dialect is None:
        return Ranks(0, 1, 0, 0, "127.0.0.1", 0, "a single process")
    rank, world = number(environment, dialect, (dialect.rank,)), number(environment, dialect, dialect.world)
    if not 0 <= rank < world:
        raise ValueError(
            f"{dialect.rank} is {rank} of {world} ranks: it must be from 0 to {world - 1}; "
            "start all ranks by one launcher"
        )
    refuse_contradiction(environment, dialect, rank, world)
    local_rank = 0 if world == 1 else number(environment, dialect, dialect.local_rank)
    local_world = ranks_of_node(environment, dialect)
    if local_world is not None and not local_rank < local_world <= world:
        raise ValueError(
            f"{dialect.source} says rank {local_rank} of {local_world} on this node, of {world} in all: each must be "
            "below the next; unset what another launcher has left in the environment, or start all ranks by one"
        )
    address, port = rendezvous(environment, dialect, rank, world)
    device = 0 if visible_devices(environment) == 1 else local_rank
    return Ranks(rank, world, local_rank, device, address, port, dialect.source, local_world, dialect.rank)


def export(environment: MutableMapping[str, str]) -> Ranks:
    """Resolve, and write the answer as the variables that torch, Megatron and DeepSpeed read.

    LOCAL_RANK becomes the device index: DeepSpeed and torch select the GPU by it. Under mpirun DeepSpeed wants Open
    MPI's to say the same.
    """
    found = resolve(environment)
    environment.update(
        RANK=str(found.rank),
        WORLD_SIZE=str(found.world),
        LOCAL_RANK=str(found.device),
        MASTER_ADDR=found.master_addr,
        MASTER_PORT=str(found.master_port),
    )
    if found.local_world is not None:
        environment["LOCAL_WORLD_SIZE"] = str(found.local_world)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
        environment["OMPI_COMM_WORLD_LOCAL_RANK"] = str(found.device)
    return found


def speaker(environment: Mapping[str, str]) -> Dialect | None:
    """The launcher that started this process; None: none did."""
    for dialect in DIALECTS:
        if dialect.rank in environment:
            return SRUN if dialect is PMI and is_of_srun(environment) else dialect
    return SRUN if inside_step(environment) else None


def is_of_srun(environment: Mapping[str, str]) -> bool:
    """Whether the PMI variables are those of `srun --mpi=pmi2`: they number the step's tasks, as SLURM does."""
    same_rank = environment["PMI_RANK"] == environment.get("SLURM_PROCID")
    size = environment.get("PMI_SIZE")
    return inside_step(environment) and same_rank and size in (None, slurm.tasks_of_step(environment))


def refuse_contradiction(environment: Mapping[str, str], dialect: Dialect, rank: int, world: int) -> None:
    """Two launchers that number the same processes, differently: all would be rank 0, or wait for ranks of the other.

    A launcher may well have been started by another: each task of a step starts some ranks. Those are at least as many
    as the tasks; and torchrun, which gives ranks in any order, is known by what it sets besides. `RANK=0 WORLD_SIZE=1`
    is how one asks for a single process in a job's shell; under mpirun every rank would be one by itself.

    Raises:
        ValueError: names the variables of both.
    """
    if dialect.rank == "RANK" and any(name in environment for name in SIGNATURES):
        return
    single = dialect.rank == "RANK" and world == 1
    for other in DIALECTS if single else (*DIALECTS, SRUN):
        if other is dialect or not claims(environment, other):
            continue
        size = next((environment[name] for name in other.world if name in environment), "")
        their_rank = environment[other.rank]
        if not (size.isdigit() and their_rank.isdigit()) or int(size) == 1:
            continue
        if world < int(size) or (world == int(size) and rank != int(their_rank)):
            raise ValueError(
                f"{dialect.rank} says rank {rank} of {world} ({dialect.source}) and {other.rank} says {their_rank} of "
                f"{size} ({other.source}): one of them is left over from another start; unset {dialect.rank} if "
                f"{other.source} has started these ranks, and {other.rank} if it has not"
            )


def claims(environment: Mapping[str, str], dialect: Dialect) -> bool:
    """Whether a launcher says of this very process which rank it is. What is typed in a terminal is none of its."""
    if dialect is SRUN:
        return inside_step(environment) and not slurm.at_terminal(environment)
    return dialect.rank in environment and not (dialect is PMI and is_of_srun(environment))


def ranks_of_node(environment: Mapping[str, str], dialect: Dialect) -> int | None:
    """Ranks on this node; None where the launcher does not say."""
    if dialect is SRUN:
        return slurm.tasks_of_node(environment)
    here = next((environment[name] for name in dialect.local_world if name in environment), "")
    return int(here) if here.isdigit() else None


def visible_devices(environment: Mapping[str, str]) -> int | None:
    """How many GPUs the environment lets this process see; None: it leaves that to the machine."""
    counts = [count_devices(environment[name]) for name in VISIBLE if name in environment]
    return min(counts, default=None)


def count_devices(text: str) -> int:
    """Of `0,1` or of UUIDs; the list ends before the first that cannot be one, as CUDA reads it."""
    names = filter(None, text.split(","))
    return len(list(itertools.takewhile(lambda name: not name.strip().startswith("-"), names)))


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
    if world > 1 and address in LOCAL_HOSTS and several_nodes(environment, dialect, world):
        raise ValueError(
            f"MASTER_ADDR is {address} while the {world} ranks are on several nodes: each node would wait for itself; "
            "export the name of the first node"
        )
    return address, int(port)


def several_nodes(environment: Mapping[str, str], dialect: Dialect, world: int) -> bool:
    """Whether the launcher says that the ranks are spread over nodes; False where it does not say."""
    if dialect is SRUN:
        return environment.get("SLURM_STEP_NUM_NODES", "1") != "1"
    here = ranks_of_node(environment, dialect)
    return here is not None and here < world
