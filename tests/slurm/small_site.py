"""A site of the tests: two small CPU nodes of one partition, and a way to submit to it."""

import dataclasses
import json
from pathlib import Path

from testbed import NODES, Testbed

from slope_megatron.launch.cluster import CLUSTERS

ROOT = Path(__file__).resolve().parents[2]
# What makes CPU nodes of a cluster file.
CHANGES = {
    "GPU": "none",
    "GPUS_PER_NODE": "1",
    "CPUS_PER_NODE": "4",
    "DTYPE": "fp32",
    "MAX_NODES": "2",
    "MAX_TIME": "20:00",
    "SBATCH_ARGS": '""',
    "MODULES": '""',
    "BANDWIDTH_FLOOR_GBS": "0",
    "ACCOUNT_REQUIRED": "no",
}
MODEL = """\
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, vocab_multiple: 48}
data: {seq_length: 32, global_batch_size: 8, micro_batch_size: 2}
optimizer: {warmup_steps: 2}
train: {eval_samples: 8, eval_interval: 1000, log_interval: 1, save_interval: 10}
"""


def site_file(path: Path, **changes: str) -> Path:
    """narval's file with other values."""
    lines = (CLUSTERS / "narval.env").read_text().splitlines()
    values = {**CHANGES, **changes}
    kept = [line for line in lines if line.partition("=")[0] not in values]
    path.write_text("\n".join([*kept, *(f"{key}={value}" for key, value in values.items())]) + "\n")
    return path


@dataclasses.dataclass
class Site:
    """Submits jobs of the small model to a pair of nodes, and reads their runs."""

    bed: Testbed
    partition: str
    folder: Path
    data: Path

    @property
    def nodes(self) -> tuple[str, ...]:
        return NODES[self.partition]

    def submit(self, name: str, *flags, cluster: Path | None = None, **variables) -> str:
        """`launch/submit.sh`; the job's number."""
        cluster = cluster or site_file(self.folder / "virtual.env", PARTITION=self.partition)
        command = [ROOT / "launch" / "submit.sh", cluster, self.folder / "tiny.yaml", "--out", self.folder / name]
        quiet = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        result = self.bed.run(*command, "--nodes", 2, "--data", self.data, *flags, **quiet, **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[1].rstrip(":")

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted((self.folder / f"{name}.job").glob("job-*.log")))

    def losses(self, name: str) -> dict[int, float]:
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        # The last line may be half written.
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        return {line["step"]: line["loss"] for line in whole if "loss" in line}

    def wait_for_step(self, name: str, step: int) -> None:
        self.bed.wait_for(f"{name} to reach step {step}", lambda: max([0, *self.losses(name)]) >= step, 300)

    def rank(self, name: str, rank: int) -> int:
        """The process of a rank."""
        return json.loads((self.folder / name / "ranks" / f"rank_{rank}.json").read_text())["pid"]
