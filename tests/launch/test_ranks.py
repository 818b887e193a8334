"""The rank resolver, on environments as the launchers really set them."""

import pytest

from slope_megatron.launch.ranks import Ranks, count_devices, export, first_host, job_port, resolve
from slope_megatron.launch.slurm import tasks_of_node

MASTER = {"MASTER_ADDR": "ng1", "MASTER_PORT": "20017"}
# What mpirun's ranks inherit from the daemon that srun started, one on each node.
DAEMON = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "ng[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MV2 = {"MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "source"),
    [
        ({**TORCHRUN, **MASTER}, "torchrun or deepspeed"),
        ({**TORCHRUN, **OMPI, **DAEMON, **MASTER}, "torchrun or deepspeed"),
        ({**OMPI, **MASTER}, "Open MPI"),
        ({**OMPI, **DAEMON, **MASTER}, "Open MPI"),
        ({**OMPI, **PMI, **DAEMON, **MASTER}, "Open MPI"),
        ({**MV2, **PMI, **DAEMON, **MASTER}, "MVAPICH2"),
        ({**PMI, **DAEMON, **MASTER}, "MPICH or Intel MPI"),
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8", **MASTER}, "srun"),
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}, "srun"),
        ({**SRUN, "PMI_RANK": "5"}, "srun"),
        ({**SRUN, "PMIX_RANK": "5"}, "srun"),
        (SRUN, "srun"),
        ({**SRUN, **MASTER}, "srun"),
    ],
)
def test_the_launcher_is_recognised_before_slurm(environment, source):
    assert resolve(environment) == Ranks(5, 8, 1, 1, "ng1", 20017, source)


def test_without_a_launcher_there_is_one_rank():
    assert resolve({"PATH": "/bin"}) == Ranks(0, 1, 0, 0, "127.0.0.1", 0, "a single process")
    assert resolve({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}).world == 1


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "4294967291"}])
def test_a_batch_shell_is_no_rank(step):
    shell = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", **step}
    with pytest.raises(ValueError, match=r"SLURM_NTASKS is 8 and this is job 17's shell.*srun slope pretrain"):
        resolve(shell)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN, "MASTER_ADDR is not set for rank 5 of 8"),
        ({**OMPI, **DAEMON}, "MASTER_ADDR is not set for rank 5 of 8"),
        ({**OMPI, "MASTER_ADDR": "ng1"}, "MASTER_PORT is not set for rank 5 of 8"),
        (
            {**OMPI, **MASTER, "MASTER_ADDR": "localhost"},
            "MASTER_ADDR is localhost while the 8 ranks are on several nodes",
        ),
        ({**SRUN, "MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR is 127.0.0.1 while the 8 ranks are on several nodes"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "MASTER_ADDR is not set for rank 5 of 8"),
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTER}, "RANK is set and LOCAL_RANK is not"),
        ({**TORCHRUN, **MASTER, "RANK": "8"}, "RANK is 8 of 8 ranks: it must be from 0 to 7"),
        ({**TORCHRUN, **MASTER, "RANK": "-1"}, "RANK is '-1': it must be a number"),
        ({**TORCHRUN, **MASTER, "WORLD_SIZE": "many"}, "WORLD_SIZE is 'many': it must be a number"),
        ({**TORCHRUN, **MASTER, "MASTER_PORT": "70000"}, "MASTER_PORT is '70000': it must be a port number"),
    ],
)
def test_what_is_wrong_is_said(environment, message):
    with pytest.raises(ValueError) as error:
        resolve(environment)
    assert message in str(error.value)


def test_localhost_serves_several_ranks_of_one_node():
    here = {**TORCHRUN, "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert resolve(here).master_addr == "127.0.0.1"


def test_one_gpu_a_task_is_device_zero():
    """srun --gpus-per-task=1: every task sees one GPU, whatever its local rank."""
    assert resolve({**SRUN, "CUDA_VISIBLE_DEVICES": "3"}).device == 0
    assert resolve({**SRUN, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}).device == 1
    assert resolve({**TORCHRUN, **MASTER, "CUDA_VISIBLE_DEVICES": "0"}).device == 0


TERMINAL = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_PTY_PORT": "40000", "SLURM_PTY_WIN_COL": "80"}


def test_the_terminal_of_a_step_is_not_rank_0_of_its_tasks():
    """`srun -n 8 --pty bash`: whoever types `slope pretrain` there would wait for 7 others."""
    with pytest.raises(ValueError) as error:
        resolve(TERMINAL)
    said = str(error.value)
    assert "SLURM_STEP_NUM_TASKS is 8 and this is the terminal of `srun --pty`" in said
    assert "for one rank, `RANK=0 WORLD_SIZE=1 slope pretrain ...`" in said
    with pytest.raises(ValueError, match="this is the terminal of"):
        resolve({**TERMINAL, "PMI_RANK": "0", "PMI_SIZE": "8"})
    assert resolve({**TERMINAL, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}).world == 1
    assert resolve({**TERMINAL, "RANK": "0", "WORLD_SIZE": "1"}).world == 1
    assert resolve({**TERMINAL, "PMI_RANK": "0", "PMI_SIZE": "8", "RANK": "0", "WORLD_SIZE": "1"}).world == 1
    # Launchers may be started there.
    two = {**OMPI, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert resolve({**TERMINAL, **two, **MASTER}).rank == 1


def test_a_batch_shell_of_tasks_per_node_is_no_rank():
    shell = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "2"}
    with pytest.raises(ValueError, match=r"the number of tasks is 8 and this is job 17's shell.*RANK=0 WORLD_SIZE=1"):
        resolve(shell)
    assert resolve({**shell, "RANK": "0", "WORLD_SIZE": "1"}).world == 1


ELASTIC = {**TORCHRUN, **MASTER, "TORCHELASTIC_RUN_ID": "none"}
STALE = {
    "RANK exported once, all tasks read it": ({**SRUN, **TORCHRUN, **MASTER, "RANK": "0"}, "SLURM_PROCID"),
    "RANK of fewer ranks than tasks": ({**SRUN, **TORCHRUN, **MASTER, "RANK": "0", "WORLD_SIZE": "4"}, "SLURM_PROCID"),
    "Open MPI's, in a step": ({**SRUN, **OMPI, **MASTER, "OMPI_COMM_WORLD_RANK": "0"}, "SLURM_PROCID"),
    "Open MPI's single one, in a step": (
        {**SRUN, **OMPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        "SLURM_PROCID",
    ),
    "PMI's, in a step": ({**SRUN, **PMI, **MASTER, "PMI_RANK": "3"}, "SLURM_PROCID"),
    "RANK of a single process, under Open MPI": (
        {**OMPI, **MASTER, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        "OMPI_COMM_WORLD_RANK",
    ),
    "RANK under Open MPI": ({**OMPI, **TORCHRUN, **MASTER, "RANK": "0"}, "OMPI_COMM_WORLD_RANK"),
    "RANK under MPICH": ({**PMI, **TORCHRUN, **MASTER, "RANK": "0"}, "PMI_RANK"),
    "Open MPI's under MPICH": ({**PMI, **OMPI, **MASTER, "OMPI_COMM_WORLD_RANK": "0"}, "PMI_RANK"),
}


@pytest.mark.parametrize(("environment", "other"), STALE.values(), ids=STALE)
def test_what_another_launcher_has_left_is_refused_by_name(environment, other):
    with pytest.raises(ValueError) as error:
        resolve(environment)
    assert f"and {other} says " in str(error.value) and "left over from another start; unset" in str(error.value)


NESTED = {
    "torchrun in each task": {**DAEMON, **TORCHRUN, **MASTER},
    "torchrun on nodes in an order of its own": {**SRUN, **ELASTIC, "SLURM_PROCID": "2", "SLURM_NTASKS": "8"},
    "torchrun in one task of many": {**SRUN, **ELASTIC, "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "6"},
    "deepspeed in a task": {**SRUN, **TORCHRUN, **MASTER, "LOCAL_SIZE": "4", "SLURM_PROCID": "3"},
    "mpirun over srun's daemons": {**OMPI, **DAEMON, **MASTER},
    "torchrun started by mpirun": {
        **{**OMPI, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        **TORCHRUN,
        **MASTER,
    },
    "torchrun in a batch shell": {
        **{"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"},
        **TORCHRUN,
        **MASTER,
    },
}


@pytest.mark.parametrize("environment", NESTED.values(), ids=NESTED)
def test_a_launcher_in_another_is_none_of_that(environment):
    assert resolve(environment).rank == 5


def test_a_local_rank_beyond_its_node_is_refused():
    with pytest.raises(ValueError, match=r"rank 4 of 4 on this node, of 8 in all: each must be below the next"):
        resolve({**TORCHRUN, **MASTER, "LOCAL_RANK": "4"})
    with pytest.raises(ValueError, match=r"rank 1 of 16 on this node, of 8 in all"):
        resolve({**TORCHRUN, **MASTER, "LOCAL_WORLD_SIZE": "16"})


@pytest.mark.parametrize(
    ("tasks", "node", "expected"),
    [("4(x2)", "1", 4), ("4(x2),3", "2", 3), ("2,4(x3),1", "0", 2), ("8", "", 8), ("4(x2)", "", None), ("", "0", None)],
)
def test_tasks_of_a_node(tasks, node, expected):
    assert tasks_of_node({"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}) == expected


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("0", 1), ("0,1", 2), ("GPU-8a6b", 1), ("MIG-1,MIG-2", 2), ("-1", 0), ("0,-1,1", 1)]
)
def test_devices_are_counted_as_cuda_does(text, count):
    assert count_devices(text) == count


def started(launcher: str, rank: int, nodes: int, each: int) -> dict[str, str]:
    """What one of nodes x each ranks finds in its environment."""
    world, node, local = nodes * each, rank // each, rank % each
    step = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": f"ng[1-{nodes}]"}
    step |= {"SLURM_STEP_NUM_NODES": str(nodes), "SLURM_NODEID": str(node)}
    task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_STEP_NUM_TASKS": str(world)}
    task |= {"SLURM_NTASKS": str(world), "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{nodes})"}
    daemon = {"SLURM_PROCID": str(node), "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": str(nodes)}
    daemon |= {"SLURM_NTASKS": str(nodes), "SLURM_STEP_TASKS_PER_NODE": f"1(x{nodes})"}
    four = [str(number) for number in (rank, world, local, each)]
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
        "Open MPI": [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
        "MVAPICH2": [f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
        "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        "Cray": ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    }
    pmi2 = {"PMI_RANK": str(rank), "PMI_SIZE": str(world)}
    if launcher in names:
        own = dict(zip(names[launcher], four, strict=True)) | MASTER
        own |= {"TORCHELASTIC_RUN_ID": "x"} if launcher == "torchrun" else {}
        return own
    inner, _, around = launcher.partition(" in ")
    if around:
        return step | daemon | started(inner, rank, nodes, each)
    return {"srun": step | task, "pmi2": step | task | pmi2, "pmix": step | task | {"PMIX_RANK": str(rank)}}[inner]


LAUNCHERS = ["torchrun", "deepspeed", "Open MPI", "MVAPICH2", "MPICH", "Cray", "srun", "pmi2", "pmix"]
LAUNCHERS += [f"{name} in srun" for name in ("torchrun", "deepspeed", "Open MPI", "MPICH")]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_every_rank_its_place_and_device(launcher):
    """Any nodes x ranks, with all GPUs of the node to be seen, one's own alone, or no word about them."""
    for nodes, each in ((1, 1), (1, 4), (2, 1), (2, 4), (3, 2)):
        for rank in range(nodes * each):
            local = rank % each
            all_of_node = ",".join(map(str, range(each)))
            for visible, device in ((None, local), (all_of_node, local), (str(local), 0)):
                environment = started(launcher, rank, nodes, each)
                environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
                found = resolve(environment)
                assert (found.rank, found.world, found.local_rank) == (rank, nodes * each, local)
                assert found.device == (0 if visible and each == 1 else device)
                assert found.local_world == each
                # What is written for the libraries says the same when it is read again.
                assert export(environment) == found and resolve(environment).rank == rank
                assert environment["LOCAL_RANK"] == str(found.device)
                assert environment["LOCAL_WORLD_SIZE"] == str(each)


def test_export_writes_what_the_libraries_read():
    environment = {**SRUN, "CUDA_VISIBLE_DEVICES": "3"}
    found = export(environment)
    assert found.local_rank == 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [environment[name] for name in names] == ["5", "8", "0", "ng1", "20017"]
    assert resolve(environment).rank == 5


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("ng1", "ng1"),
        ("ng[1-2]", "ng1"),
        ("c[301-302,7],ng1", "c301"),
        ("a,b[1-2]", "a"),
        ("r[07-09]c[3,5]n", "r07c3n"),
        ("", ""),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


def test_ports_stay_below_the_ephemeral_ones():
    assert job_port("17") == 20017
    assert all(20000 <= job_port(str(job)) < 32768 for job in (0, 11999, 12000, 99999999))
