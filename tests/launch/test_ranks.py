"""The rank resolver, on environments as the launchers really set them."""

import pytest

from slope_megatron.launch.ranks import Ranks, export, first_host, job_port, resolve

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
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8", **MASTER}, "MPICH or Intel MPI"),
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
    assert resolve({**TORCHRUN, **MASTER, "CUDA_VISIBLE_DEVICES": "0"}).device == 1


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
