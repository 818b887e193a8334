"""What SLURM's variables say: whether this process is a task of a step, a job's shell, or a terminal within a step.

Tasks of a real step have a SLURM_STEP_ID that counts from 0, and SLURM_PROCID is their rank. Shells have the variables
of what they run in: a batch shell those of its job, `srun --pty bash` those of the one task that it is. Whoever starts
a single process there must not be taken for rank 0 of many, which would wait for tasks that never come.
"""

import re
from collections.abc import Mapping

# SLURM numbers the batch shell, the interactive shell and the like from here on; real steps count from 0.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Below the ports that Linux hands out by itself (from 32768 on).
FIRST_PORT, PORTS = 20000, 12000
ONE_RANK = "RANK=0 WORLD_SIZE=1 slope pretrain ..."


def inside_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process, or the shell that it was started from, as a task of an ordinary step."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < FIRST_SPECIAL_STEP and "SLURM_PROCID" in environment


def at_terminal(environment: Mapping[str, str]) -> bool:
    """Whether the step has a terminal (`srun --pty`): its variables are also those of whatever is typed there."""
    return any(name.startswith("SLURM_PTY_") for name in environment)


def tasks_of_step(environment: Mapping[str, str]) -> str:
    return environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"


def tasks_of_job(environment: Mapping[str, str]) -> str:
    """As asked for by --ntasks, or by --ntasks-per-node alone."""
    tasks = environment.get("SLURM_NTASKS") or environment.get("SLURM_NPROCS")
    if tasks:
        return tasks
    each, nodes = environment.get("SLURM_NTASKS_PER_NODE", ""), environment.get("SLURM_JOB_NUM_NODES", "1")
    return str(int(each) * int(nodes)) if each.isdigit() and nodes.isdigit() else "1"


def tasks_of_node(environment: Mapping[str, str]) -> int | None:
    """Tasks of this step on this node: of `4(x2),3` the one that SLURM_NODEID counts to; None where SLURM is silent."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = environment.get("SLURM_NODEID", "")
    if len(counts) == 1:
        return counts[0]
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def refuse_shell(environment: Mapping[str, str]) -> None:
    """Refuse the shell of several tasks, where the other ranks would never come; say how ranks are started from it."""
    job = environment.get("SLURM_JOB_ID")
    if inside_step(environment):
        tasks = tasks_of_step(environment)
        if at_terminal(environment) and tasks != "1":
            raise ValueError(
                f"SLURM_STEP_NUM_TASKS is {tasks} and this is the terminal of `srun --pty`, where the other tasks "
                f"would never come: for one rank, `{ONE_RANK}`; for several on this node, torchrun or deepspeed; for "
                f"all {tasks}, leave this shell and give `srun slope pretrain ...` without --pty"
            )
        return
    tasks = tasks_of_job(environment)
    if job and tasks != "1":
        raise ValueError(
            f"{'SLURM_NTASKS' if 'SLURM_NTASKS' in environment else 'the number of tasks'} is {tasks} and this is job "
            f"{job}'s shell, not one of its tasks: start the ranks with `srun slope pretrain ...`, or with torchrun, "
            f"deepspeed or mpirun; one rank alone with `{ONE_RANK}`"
        )


def first_host(nodelist: str) -> str:
    """`c[301-302,7],ng1` -> `c301`: the first name of SLURM's short form."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def job_port(job_id: str) -> int:
    """A port that two jobs on one node do not share, unless their numbers differ by a multiple of `PORTS`."""
    return FIRST_PORT + (int(job_id) if job_id.isdigit() else 0) % PORTS
