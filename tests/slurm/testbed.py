"""A real SLURM on this machine: several slurmd with names of their own, shaped like the clusters we have files for.

No systemd, nothing under /etc/slurm: everything lies in one folder, and processes are ended by their pid files. Needs
root (munge, cgroups, /etc/hosts) and SLURM, which `install` takes from the distribution. Nothing outlives the tests: a
watcher cleans up when they are killed.
"""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from processes import alive, end, end_processes_of

PACKAGES = ("slurm-wlm", "slurm-wlm-basic-plugins", "munge", "openmpi-bin")
# (first node name, suffixes, CPUs, memory, GPU type, GPUs, partition, its options)
SHAPES = (
    ("ng", (1, 2), 48, 510000, "a100", 4, "narval", "Default=YES MaxTime=7-0 PriorityTier=1"),
    ("c30", (1, 2), 128, 256000, "a100", 3, "gpu-a100", "MaxTime=2-0"),
    ("mist", (1, 2), 32, 256000, "v100", 4, "compute_full_node", "MaxTime=1-0"),
    ("gen", (1, 2), 96, 2000000, "h100", 8, "generic", "MaxTime=1-0"),
)
NODES = {shape[6]: tuple(f"{shape[0]}{number}" for number in shape[1]) for shape in SHAPES}
HOSTS_MARK = "# slope-megatron test nodes"
SLURM_CONF = """\
ClusterName=virt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=120
SlurmdTimeout=120
InactiveLimit=0
KillWait=5
MinJobAge=600
Waittime=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2,sched_min_interval=0,requeue_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
"""


def cannot() -> str | None:
    """Why there can be no SLURM here; None: there can."""
    if os.geteuid() != 0:
        return "SLURM test bed: needs root (munge, cgroups, names in /etc/hosts)"
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        return "SLURM test bed: slurmctld is not installed, and there is no apt-get to install it with"
    return None


def install() -> str | None:
    """Install what is missing; the reason if that fails."""
    if shutil.which("slurmctld") and shutil.which("munged") and shutil.which("mpirun"):
        return None
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return f"SLURM test bed: {' '.join(command[:2])} took more than five minutes"
        if result.returncode:
            return f"SLURM test bed: {' '.join(command[:2])} failed: {(result.stderr.splitlines() or ['?'])[-1]}"
    return None


def free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class Testbed:
    """Controller, daemons and their folder, from `start` to `stop`."""

    __test__ = False

    def __init__(self, folder: Path):
        self.folder = folder
        self.nodes = [node for pair in NODES.values() for node in pair]
        self.started_munge = False
        self.watcher: subprocess.Popen | None = None

    @property
    def environment(self) -> dict[str, str]:
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return {**outside, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    # -- starting and stopping ----------------------------------------------------------------------------------------

    def start(self) -> str | None:
        """Bring all nodes up; the reason if they stay down."""
        self._start_munge()
        self._watch()
        self._name_nodes()
        tried = []
        # Clusters track processes by cgroup, and signals differ without it: linuxproc only where cgroups refuse.
        for proctrack, plugin in (("cgroup", "cgroup/v1"), ("cgroup", "autodetect"), ("linuxproc", "disabled")):
            self._write(proctrack, plugin)
            self._run_daemons()
            if self._all_idle():
                return None
            tried.append(f"{proctrack} with {plugin}")
            self._end_daemons()
        return f"SLURM test bed: nodes did not come up with {', '.join(tried)}; logs in {self.folder / 'log'}"

    def stop(self) -> None:
        """End jobs, daemons and what is left of either."""
        if self.watcher:
            self.watcher.terminate()
            self.watcher.wait()
        self.end_jobs()
        self._end_daemons()
        end_processes_of(self.environment["SLURM_CONF"])
        if self.started_munge:
            end(Path("/run/munge/munged.pid"))
        hosts = Path("/etc/hosts")
        hosts.write_text("".join(line for line in hosts.open() if HOSTS_MARK not in line))

    def end_jobs(self, seconds: float = 20.0) -> None:
        """Cancel all jobs, and wait until their processes are gone."""
        self.run("scancel", "--user=root", "--full")
        deadline = time.monotonic() + seconds
        while self.run("squeue", "--noheader").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.3)

    def _watch(self) -> None:
        """A process of its own session that calls `stop` when this one is gone, however it went."""
        command = [sys.executable, __file__, str(os.getpid()), str(self.folder), str(int(self.started_munge))]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.watcher = subprocess.Popen(command, start_new_session=True, **quiet)

    def _start_munge(self) -> None:
        if alive(Path("/run/munge/munged.pid")):
            return
        owner = pwd.getpwnam("munge")
        Path("/run/munge").mkdir(mode=0o755, exist_ok=True)
        os.chown("/run/munge", owner.pw_uid, owner.pw_gid)
        command = ["runuser", "-u", "munge", "--", "/usr/sbin/munged", "--pid-file=/run/munge/munged.pid"]
        subprocess.run(command, check=True, capture_output=True)
        self.started_munge = True

    def _name_nodes(self) -> None:
        """MASTER_ADDR is a node's name: it must have an address."""
        hosts = Path("/etc/hosts")
        kept = [line for line in hosts.open() if HOSTS_MARK not in line]
        hosts.write_text("".join(kept) + f"127.0.0.1 {' '.join(self.nodes)} {HOSTS_MARK}\n")

    def _write(self, proctrack: str, plugin: str) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("etc", "dev", "state", "log", "run", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        # SLURM counts GPUs by their device files; /dev/null's twins do.
        for index in range(8):
            os.mknod(self.folder / "dev" / f"nvidia{index}", 0o666 | 0o020000, os.makedev(1, 3))
        port, *ports = free_ports(1 + len(self.nodes))
        host = socket.gethostname().split(".")[0]
        conf = SLURM_CONF.format(folder=self.folder, host=host, port=port, proctrack=proctrack)
        gres = "AutoDetect=off\n"
        for first, numbers, cpus, memory, gpu, gpus, partition, options in SHAPES:
            for number in numbers:
                conf += (
                    f"NodeName={first}{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports.pop()} CPUs={cpus} "
                    f"Boards=1 SocketsPerBoard=2 CoresPerSocket={cpus // 2} ThreadsPerCore=1 RealMemory={memory} "
                    f"Gres=gpu:{gpu}:{gpus} State=UNKNOWN\n"
                )
                files = f"{self.folder}/dev/nvidia[0-{gpus - 1}]"
                gres += f"NodeName={first}{number} Name=gpu Type={gpu} File={files}\n"
            nodes = ",".join(f"{first}{number}" for number in numbers)
            conf += f"PartitionName={partition} Nodes={nodes} State=UP {options}\n"
        conf += "PartitionName=urgent Nodes=ng1,ng2 MaxTime=1-0 State=UP PriorityTier=10 PreemptMode=OFF\n"
        conf += "PartitionName=preemptible Nodes=ng1,ng2 MaxTime=1-0 State=UP PriorityTier=1 GraceTime=30\n"
        cgroup = f"CgroupPlugin={plugin}\nCgroupMountpoint=/sys/fs/cgroup\nConstrainCores=no\nConstrainRAMSpace=no\n"
        (self.folder / "etc" / "slurm.conf").write_text(conf)
        (self.folder / "etc" / "gres.conf").write_text(gres)
        (self.folder / "etc" / "cgroup.conf").write_text(cgroup + "ConstrainDevices=no\n")

    def _run_daemons(self) -> None:
        for command in (["slurmctld", "-c"], *(["slurmd", "-N", node] for node in self.nodes)):
            subprocess.run(command, env=self.environment, capture_output=True)

    def _end_daemons(self) -> None:
        end(*sorted((self.folder / "run").glob("*.pid")))

    def _all_idle(self) -> bool:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            states = self.run("sinfo", "-h", "-N", "-o", "%N %T").stdout.splitlines()
            if {line.split()[0] for line in states if line.endswith(" idle")} == set(self.nodes):
                return True
            time.sleep(0.2)
        return False

    # -- using it -----------------------------------------------------------------------------------------------------

    def run(self, *command, **variables) -> subprocess.CompletedProcess:
        environment = {**self.environment, **variables}
        return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=120)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, what: str, condition, seconds: float = 240.0):
        """What `condition()` returns once it is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            time.sleep(0.3)
        raise AssertionError(f"{what}: not within {seconds:.0f} s")

    def wait_for_end(self, number: str, seconds: float = 600.0) -> dict[str, str]:
        """The job's record once it has ended for good. A requeued job waits two minutes by itself: it is hurried."""

        def ended():
            job = self.job(number)
            if job.get("JobState") == "PENDING" and job.get("Reason") == "BeginTime":
                self.run("scontrol", "update", f"jobid={number}", "StartTime=now")
            return job if job.get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") else None

        return self.wait_for(f"job {number} to end", ended, seconds)


def watch(process: int, folder: Path, started_munge: bool) -> None:
    """Wait for the end of the process that runs the tests, and clean up after it."""
    while Path(f"/proc/{process}").exists():
        time.sleep(1.0)
    testbed = Testbed(folder)
    testbed.started_munge = started_munge
    testbed.stop()


if __name__ == "__main__":
    watch(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "1")
