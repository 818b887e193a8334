"""launch/submit.sh up to the sbatch line: what it asks for, and what it refuses before a node is wasted."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slope_megatron.launch.cluster import CLUSTERS, read_cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("submit.sh", "pretrain.sbatch", "node.sh")
MODEL = """\
model: {num_layers: 24, hidden_size: 768, num_attention_heads: 12}
data: {seq_length: 768, global_batch_size: 48}
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "a model's.yaml"
    path.write_text(MODEL)
    return path


def submit(*arguments, **variables):
    """`launch/submit.sh ... --dry-run`, from some other folder."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("SBATCH_", "SLURM_"))}
    # The interpreter of the tests is the environment.
    outside |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "SLOPE_VENV": "/nowhere"}
    command = [ROOT / "launch" / "submit.sh", *map(str, arguments), "--dry-run"]
    return subprocess.run(command, capture_output=True, text=True, env={**outside, **variables}, cwd="/")


@pytest.mark.parametrize("cluster", sorted(path.stem for path in CLUSTERS.glob("*.env")))
def test_every_cluster_gets_a_line_of_its_own(model, cluster):
    result = submit(cluster, model, "--nodes", 2, "--data", "corpus", "--steps", 100)
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    facts = read_cluster(cluster)
    assert words[0] == "sbatch" and "--nodes=2" in words
    assert f"--ntasks-per-node={facts.gpus_per_node}" in words and f"--time={facts.max_time}" in words
    assert set(facts.sbatch_args.split()) <= set(words)
    assert ([f"--partition={facts.partition}"] if facts.partition else []) == [w for w in words if "--partition" in w]
    assert words[words.index("--dtype") + 1] == facts.dtype
    assert words[-4:] == ["--data", "corpus", "--steps", "100"], "the rest goes to slope pretrain"
    assert "--tensor-parallel" in words


def test_values_travel_whole(model, tmp_path):
    """Spaces and quotes in names do no harm, and nothing is evaluated."""
    data = """it's $(touch here) "data"; #"""
    result = submit("narval", model, "--nodes", 1, "--data", data, "--out", tmp_path / "my run", "--account", "def a")
    words = shlex.split(result.stdout)
    assert words[-1] == data and "--account=def a" in words and str(tmp_path / "my run") in words
    assert "--job-name=a model's-narval" in words
    assert not Path("/here").exists() and not list(tmp_path.glob("my run*")), "a dry run writes nothing"


def test_options_become_sbatch_options(model):
    given = ["--time", "2:00:00", "--partition", "p", "--launcher", "mpirun", "--exclude", "n1", "--signal-seconds", 60]
    result = submit("narval", model, "--nodes", 1, *given, "--chain", 3, "--no-preflight", "--sbatch", "--qos=x")
    words = shlex.split(result.stdout)
    assert {"--time=2:00:00", "--partition=p", "--exclude=n1", "--signal=B:USR1@60", "--qos=x"} <= set(words)
    assert "--dependency=singleton" in words and "--requeue" in words
    script = next(index for index, word in enumerate(words) if word.endswith("pretrain.sbatch"))
    assert words[script + 3 : script + 5] == ["mpirun", "no"]


def test_the_account_may_come_from_the_environment(model):
    assert "--account=def-x" in shlex.split(submit("narval", model, "--nodes", 1, SBATCH_ACCOUNT="def-x").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give CLUSTER and MODEL"),
        (["narwal", "MODEL", "--nodes", 1], "cluster 'narwal' has no file"),
        (["narval", "opt-1t", "--nodes", 1], "model 'opt-1t' has no file"),
        (["narval", "MODEL"], "--nodes is '': it must be a number from 1 on"),
        (["narval", "MODEL", "--nodes", "two"], "--nodes is 'two': it must be a number from 1 on"),
        (["lonestar6", "MODEL", "--nodes", 9], "--nodes is 9: lonestar6 gives a job 1 to 8 nodes"),
        (["narval", "MODEL", "--nodes", 1, "--launcher", "ssh"], "--launcher is 'ssh'"),
        (["narval", "MODEL", "--nodes", 1, "--time", "soon"], "--time is 'soon': it must be a time as sbatch takes it"),
        (["narval", "MODEL", "--nodes", 1, "--tensor-parallel", 3], "has tensor 3: TP x PP x DP must be 4"),
        (
            [
                "narval",
                "MODEL",
                "--nodes",
                1,
                "--global-batch-size",
                7,
                "--tensor-parallel",
                1,
                "--pipeline-parallel",
                1,
            ],
            "it must be a multiple",
        ),
        (["narval", "MODEL", "--nodes", 1, "--slope-nm", "5:4"], "--slope-nm is '5:4'"),
        (["narval", "MODEL", "--nodes", 1, "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["narval", "MODEL", "--nodes", 1, "--hidden-size", 49152, "--num-attention-heads", 96], "model fits none of"),
    ],
)
def test_bad_input_is_refused_before_sbatch(model, arguments, message):
    result = submit(*[model if argument == "MODEL" else argument for argument in arguments])
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and "Traceback" not in result.stderr


# The account is asked for after the time limit was found well formed.
@pytest.mark.parametrize("time", ["90", "90:00", "1:00:00", "2-12", "2-12:30", "7-00:00:00"])
def test_an_account_is_asked_for_where_the_site_needs_one(model, time):
    arguments = [ROOT / "launch" / "submit.sh", "narval", model, "--nodes", "1", "--test-only", "--time", time]
    environment = {key: value for key, value in os.environ.items() if key != "SBATCH_ACCOUNT"}
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "give --account NAME, or set SBATCH_ACCOUNT" in result.stderr


def test_a_machine_without_slurm_is_named(model, tmp_path):
    """Only the dry run needs no sbatch."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "basename"):
        (tools / name).symlink_to(shutil.which(name))
    command = [ROOT / "launch" / "submit.sh", "narval", model, "--nodes", "1", "--account", "def-x"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tools)})
    assert result.returncode == 2 and "there is no sbatch on this machine: submit from a login node" in result.stderr


def test_missing_data_is_refused_before_a_job_waits_for_it(model, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "sbatch").chmod(0o755)
    command = [ROOT / "launch" / "submit.sh", "narval", model, "--nodes", "1", "--account", "def-x"]
    command += ["--data", tmp_path / "none", "--out", tmp_path / "run"]
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and f"--data {tmp_path}/none holds no prepared data: write it here" in result.stderr
    assert not (tmp_path / "run.job").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_pass_shellcheck(script):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(["shellcheck", ROOT / "launch" / script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_programs_and_hold_no_secret_or_home(script):
    path = ROOT / "launch" / script
    text = path.read_text()
    assert os.access(path, os.X_OK) or script == "pretrain.sbatch"
    assert "/home/" not in text and "API_KEY" not in text
    assert subprocess.run(["bash", "-n", path]).returncode == 0
