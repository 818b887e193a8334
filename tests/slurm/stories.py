"""What can happen to a job of the small model, each story from its submission to its end, on a pair of nodes.

A story mostly waits, for SLURM, for steps, for a signal to be answered: so several are played at once, and the tests
look at what each has left behind.
"""

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future

from processes import running, step_of
from small_site import Site, site_file

# Open MPI's shared memory takes two virtual nodes for one and crashes; and everything here is root's.
MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,tcp",
}
STEPS = ["--steps", 60, "--no-preflight"]
RARE = ["--save-interval", 1000]


@dataclasses.dataclass(frozen=True)
class Story:
    """What a job has left behind.

    Args:
        job: SLURM's record of it.
        begun, done: whether there is a run folder, and the marker of a complete run in it.
        before: of a job that was submitted twice, how the first one ended.
    """

    job: dict[str, str]
    log: str
    losses: dict[int, float]
    begun: bool
    done: bool
    before: "Story | None" = None


def told(site: Site, name: str, number: str, before: Story | None = None) -> Story:
    """Once the job has ended for good."""
    job = site.bed.wait_for_end(number)
    run = site.folder / name
    return Story(job, site.log(name), site.losses(name), run.exists(), (run / "DONE").is_file(), before)


def undisturbed(site: Site) -> Story:
    return told(site, "undisturbed", site.submit("undisturbed", *STEPS[:2]))


def usr1(launcher: str) -> Callable[[Site], Story]:
    """What SLURM sends when the time is nearly up."""

    def play(site: Site) -> Story:
        name = f"usr1-{launcher}"
        number = site.submit(name, *STEPS, *RARE, "--launcher", launcher, **MPI)
        site.wait_for_step(name, 7)
        site.bed.run("scancel", "--signal=USR1", "--batch", number)
        return told(site, name, number)

    return play


def killed_rank(site: Site) -> Story:
    number = site.submit("crash", *STEPS)
    site.wait_for_step("crash", 12)
    os.kill(site.rank("crash", 1), signal.SIGKILL)
    return told(site, "crash", number)


def node_down(site: Site) -> Story:
    number = site.submit("node-down", *STEPS)
    site.wait_for_step("node-down", 12)
    node, step = site.nodes[1], step_of(site.rank("node-down", 1))
    site.bed.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    site.bed.wait_for("the job to be requeued", lambda: site.bed.job(number).get("Restarts") == "1", 60)
    # Both attempts' steps have the same number: while the first is still there, SLURM takes the second for it and ends
    # that. `told` hurries the second attempt, which else comes two minutes later.
    site.bed.wait_for(f"the first attempt's step to leave {node}", lambda: not any(map(running, step)), 60)
    site.bed.run("scontrol", "update", f"nodename={node}", "state=resume")
    return told(site, "node-down", number)


def preempted(site: Site) -> Story:
    number = site.submit("preempted", *STEPS, "--partition", "preemptible")
    site.wait_for_step("preempted", 12)
    urgent = ["--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 2", "--output=/dev/null"]
    site.bed.wait_for_end(site.bed.run("sbatch", *urgent).stdout.strip())
    return told(site, "preempted", number)


def hopeless(site: Site) -> Story:
    """Of data that only the ranks refuse: submit.sh asks them for no more than their vocabulary."""
    data = site.folder / "newer"
    data.mkdir()
    (data / "manifest.json").write_text(json.dumps({"format": 99, "files": {}, "vocab_size": 512}))
    return told(site, "hopeless", site.submit("hopeless", *STEPS, "--data", data))


def asked_then_cancelled(site: Site) -> Story:
    """Told to stop; submitted again; cancelled."""
    number = site.submit("asked", *STEPS, *RARE)
    site.wait_for_step("asked", 5)
    (site.folder / "asked.job" / "stop").touch()
    site.bed.run("scancel", "--signal=USR1", "--batch", number)
    asked = told(site, "asked", number)
    again = site.submit("asked", *STEPS, *RARE)
    site.wait_for_step("asked", max(asked.losses) + 1)
    site.bed.run("scancel", again)
    return told(site, "asked", again, before=asked)


def bad_node(site: Site) -> Story:
    """A false nvidia-smi: four idle A100 on one node, three on the other."""
    tools = site.folder / "tools"
    tools.mkdir()
    shim = tools / "nvidia-smi"
    shim.write_text(
        f"#!/bin/bash\n[ $SLURMD_NODENAME = {site.nodes[1]} ] && count=3 || count=4\n"
        "for ((i = 0; i < count; i++)); do echo 'NVIDIA A100-SXM4-40GB, 8.0, 4, 0'; done\n"
    )
    shim.chmod(0o755)
    changes = {"GPU": "A100", "GPUS_PER_NODE": "4", "CPUS_PER_NODE": "16", "PARTITION": site.partition}
    cluster = site_file(tools / "gpus.env", **changes)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return told(site, "bad-node", site.submit("bad-node", "--steps", 60, cluster=cluster, PATH=path))


# One after the other on a pair of nodes; the pairs at the same time. What takes nodes from other jobs comes first.
LANES = {
    "narval": {"preempted": preempted, "usr1-mpirun": usr1("mpirun"), "hopeless": hopeless},
    "gpu-a100": {"usr1-srun": usr1("srun"), "crash": killed_rank, "bad-node": bad_node},
    "compute_full_node": {"node-down": node_down, "asked": asked_then_cancelled},
    "generic": {"undisturbed": undisturbed, "usr1-torchrun": usr1("torchrun"), "usr1-deepspeed": usr1("deepspeed")},
}


class Stories:
    """All of them, begun at once; `stories[name]` waits for one, or raises what went wrong in it."""

    def __init__(self, sites: dict[str, Site]):
        self.told = {name: Future() for lane in LANES.values() for name in lane}
        for partition, lane in LANES.items():
            # They must not keep an interrupted test run from ending.
            threading.Thread(target=self._play, args=(sites[partition], lane), daemon=True).start()

    def __getitem__(self, name: str) -> Story:
        return self.told[name].result()

    def _play(self, site: Site, lane: dict[str, Callable[[Site], Story]]) -> None:
        for name, play in lane.items():
            try:
                self.told[name].set_result(play(site))
            except BaseException as error:
                self.told[name].set_exception(error)
                # What is left of it must not disturb the next one.
                site.bed.run("scancel", f"--partition={site.partition}")
