"""Preflight: every node looks at itself, rank 0 collects, compares and names the bad ones.

One task a node. The nodes meet in a TCP store at MASTER_ADDR:MASTER_PORT, the address that training will use, so that
a blocked port or an unreachable node shows here, by name, and not as a hang of all ranks.
"""

import dataclasses
import datetime
import json
import socket
import statistics
import subprocess
import time

from slope_megatron.launch.ranks import Ranks
from slope_megatron.preflight.node_checks import Finding


@dataclasses.dataclass(frozen=True)
class Report:
    """What one node found, and the versions of what must be equal on all nodes."""

    node: str
    findings: list[Finding]
    versions: dict[str, str]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Report":
        values = json.loads(text)
        return cls(values["node"], [Finding(**finding) for finding in values["findings"]], values["versions"])


def node_name(environment) -> str:
    """As SLURM calls this node; its exclusion list wants that name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def node_names(environment, count: int) -> list[str]:
    """All nodes of the step in the order of its ranks; numbers where SLURM is not there to ask."""
    nodelist = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if nodelist:
        try:
            result = subprocess.run(
                ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=10
            )
            names = result.stdout.split()
            if len(names) == count:
                return names
        except (OSError, subprocess.TimeoutExpired):
            pass
    return [f"node number {number}" for number in range(count)]


def open_store(ranks: Ranks, seconds: float):
    """The store in which nodes leave their reports; a ValueError where the first node cannot be reached."""
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=seconds)
    first = ranks.rank == 0
    try:
        return dist.TCPStore(ranks.master_addr, ranks.master_port, ranks.world, first, timeout, wait_for_workers=False)
    except (RuntimeError, OSError, ValueError) as error:
        where = f"{ranks.master_addr}:{ranks.master_port}"
        reason = str(error).splitlines()[0]
        if first:
            raise ValueError(f"port {where} cannot be opened ({reason}): set another MASTER_PORT") from None
        raise ValueError(f"{where} cannot be reached ({reason}): a firewall, or the first node is down") from None


def collect(store, mine: Report, ranks: Ranks, names: list[str], seconds: float) -> list[Report]:
    """All nodes' reports, on rank 0. A node that leaves none gets one that says so."""
    store.set(f"report/{ranks.rank}", mine.to_json())
    if ranks.rank:
        return [mine]
    reports = []
    deadline = time.monotonic() + seconds
    for rank in range(ranks.world):
        left = max(deadline - time.monotonic(), 0.1)
        try:
            store.wait([f"report/{rank}"], datetime.timedelta(seconds=left))
            reports.append(Report.from_json(store.get(f"report/{rank}").decode()))
        except RuntimeError:
            text = f"no report within {seconds:.0f} s: the node is down, slow, or cannot reach the first node"
            reports.append(Report(names[rank], [Finding("report", False, text)], {}))
    return reports


def compare(reports: list[Report]) -> list[Report]:
    """Add to each node what only a look at the others shows: other versions, other data than most nodes have."""
    checked = []
    for report in reports:
        findings = list(report.findings)
        for package, version in report.versions.items():
            usual = statistics.mode(filter(None, (other.versions.get(package) for other in reports)))
            if version != usual:
                text = f"{package} is {version} and elsewhere {usual}: use one environment on all nodes"
                findings.append(Finding("versions", False, text))
        data = data_text(report)
        if data and data != (usual := statistics.mode(filter(None, map(data_text, reports)))):
            findings.append(Finding("data", False, f"{data}, and elsewhere {usual}: use one copy"))
        checked.append(dataclasses.replace(report, findings=findings))
    return checked


def data_text(report: Report) -> str | None:
    return next((finding.text for finding in report.findings if finding.check == "data" and finding.ok), None)


def failure_report(reports: list[Report]) -> tuple[str, list[str]]:
    """The text for the log, and the bad nodes."""
    lines, bad = [], []
    for report in reports:
        failed = [finding for finding in report.findings if not finding.ok]
        if failed:
            bad.append(report.node)
        lines += [f"preflight: {report.node}: FAILED {finding.check}: {finding.text}" for finding in failed]
    if bad and len(bad) < len(reports):
        # A node that said nothing, where SLURM is not there to tell its name, cannot be excluded by name.
        named = [node for node in bad if " " not in node]
        advice = f"submit again with --exclude={','.join(named)}" if named else "find and leave them out"
        lines.append(f"preflight: {len(bad)} of {len(reports)} nodes are bad; {advice}")
    elif bad:
        lines.append(f"preflight: all {len(reports)} nodes failed: the cause is common to them, not a node")
    else:
        lines.append(f"preflight: {len(reports)} nodes are ready")
    return "\n".join(lines), bad


def settle(store, ranks: Ranks, key: str, text: str, seconds: float) -> str:
    """Rank 0's word, on every node; all wait for it."""
    if ranks.rank == 0:
        store.set(key, text)
        return text
    try:
        store.wait([key], datetime.timedelta(seconds=seconds))
        return store.get(key).decode()
    except RuntimeError:
        raise ValueError(f"the first node said nothing for {seconds:.0f} s: see what it printed") from None


def leave(store, ranks: Ranks, seconds: float) -> None:
    """Rank 0 holds the store: it leaves last."""
    store.add("left", 1)
    if ranks.rank == 0:
        deadline = time.monotonic() + seconds
        while store.add("left", 0) < ranks.world and time.monotonic() < deadline:
            pass
