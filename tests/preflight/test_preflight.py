"""Preflight: each check on made-up facts, the collected failure_report, and two nodes that are processes."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from slope_megatron.cli import preflight as command
from slope_megatron.config import Config, DataConfig, TrainConfig
from slope_megatron.launch.cluster import read_cluster
from slope_megatron.launch.ports import free_port
from slope_megatron.preflight import bandwidth, node_checks
from slope_megatron.preflight.node_checks import Finding
from slope_megatron.preflight.preflight import Report, compare, failure_report

ROOT = Path(__file__).resolve().parents[2]
NARVAL = read_cluster("narval")
GOOD = ["NVIDIA A100-SXM4-40GB", "8.0", "4", "0"]


def failures(findings):
    return [finding.text for finding in findings if not finding.ok]


def test_sound_gpus_pass():
    found = node_checks.check_gpus(NARVAL, [GOOD] * 4)
    assert [finding.ok for finding in found] == [True]
    assert not failures(node_checks.check_gpus(NARVAL, [[*GOOD[:3], "[N/A]"]] * 4)), "no ECC counter is no error"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([GOOD] * 3, "3 GPUs, and the cluster file says 4"),
        ("nvidia-smi cannot be run: no such file", "nvidia-smi cannot be run: no such file; 4 x A100"),
        ([GOOD] * 3 + [["H100", "9.0", "4", "0"]], "GPU 3 is a H100 (sm_90), and the cluster file says A100"),
        ([["V100", "7.0", "4", "0"]] * 4, "has no 2:4 tensor cores, which start at sm_80: set SPARSE_24=no"),
        ([GOOD] * 3 + [[*GOOD[:2], "20000", "0"]], "GPU 3 has 20000 MiB in use by somebody else"),
        ([GOOD] * 3 + [[*GOOD[:3], "2"]], "GPU 3 has 2 uncorrected memory errors"),
    ],
)
def test_bad_gpus_are_named(answer, message):
    assert any(message in text for text in failures(node_checks.check_gpus(NARVAL, answer)))


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    config = Config(train=TrainConfig(out=str(tmp_path / "not" / "yet")))
    assert not failures(node_checks.check_disk(config, 50272))
    monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    (text,) = failures(node_checks.check_disk(config, 50272))
    assert "0.0 GiB free in" in text and "3 checkpoints need" in text and "--keep-checkpoints" in text
    (text,) = failures(node_checks.check_shared_memory(str(tmp_path)))
    assert "1 GiB are needed" in text


def test_missing_shared_memory_and_data_are_named(tmp_path):
    (text,) = failures(node_checks.check_shared_memory(str(tmp_path / "shm")))
    assert "does not exist" in text
    for data, message in (("", "no data: give --data"), (tmp_path / "no", "cannot be read"), (tmp_path, "no prepared")):
        (text,) = failures(node_checks.check_data(Config(data=DataConfig(data=str(data)))))
        assert message in text


def test_names_must_resolve():
    assert not failures(node_checks.check_names("localhost"))
    (text,) = failures(node_checks.check_names("no-such-host.invalid"))
    assert "first node 'no-such-host.invalid' has no address" in text


def node(name, *findings, torch="2.11", data="corpus: 5 files, 100 bytes"):
    return Report(name, [Finding("data", True, data), *findings], {"torch": torch})


def test_the_bad_node_is_named_with_the_exclude_to_use():
    text, bad = failure_report([node("ng1"), node("ng2", Finding("ecc", False, "GPU 1 has errors")), node("ng3")])
    assert bad == ["ng2"]
    assert "preflight: ng2: FAILED ecc: GPU 1 has errors" in text and "--exclude=ng2" in text


def test_what_all_nodes_share_is_no_node_s_fault():
    text, bad = failure_report(
        [node("ng1", Finding("disk", False, "full")), node("ng2", Finding("disk", False, "full"))]
    )
    assert len(bad) == 2 and "the cause is common to them" in text and "--exclude" not in text


def test_other_versions_and_other_data_are_found_by_comparison():
    reports = compare([node("a"), node("b", torch="2.10"), node("c", data="corpus: 5 files, 99 bytes"), node("d")])
    text, bad = failure_report(reports)
    assert bad == ["b", "c"]
    assert "torch is 2.10 and elsewhere 2.11" in text and "99 bytes, and elsewhere corpus: 5 files, 100 bytes" in text


def test_a_report_survives_its_journey():
    report = node("ng1", Finding("gpus", False, "none"))
    assert Report.from_json(report.to_json()) == report


def test_bandwidth_has_a_floor():
    assert bandwidth.bus_bandwidth(4, 10**9, 1.0) == pytest.approx(1.5)
    assert bandwidth.against_floor("2 nodes", 3.0, 2.0).ok
    slow = bandwidth.against_floor("2 nodes", 1.0, 2.0)
    assert not slow.ok and "below the floor of 2.0 (BANDWIDTH_FLOOR_GBS)" in slow.text


# -- nodes that are processes ----------------------------------------------------------------------------------------

PATIENCE = 600
PROGRAM = """\
import argparse, sys
from slope_megatron.cli import preflight
parser = argparse.ArgumentParser()
preflight.add_parser(parser.add_subparsers())
arguments = parser.parse_args(["preflight", *sys.argv[1:]])
sys.exit(arguments.run(arguments))
"""


@pytest.fixture
def flags(tmp_path):
    lines = (ROOT / "launch/clusters/narval.env").read_text().splitlines()
    kept = [line for line in lines if line.partition("=")[0] not in ("GPU", "BANDWIDTH_FLOOR_GBS")]
    (tmp_path / "cpu.env").write_text("\n".join([*kept, "GPU=none", "BANDWIDTH_FLOOR_GBS=0"]) + "\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"vocab_size": 500}')
    small = ["--num-layers", "1", "--hidden-size", "64", "--num-attention-heads", "4"]
    return ["--cluster", str(tmp_path / "cpu.env"), "--data", str(tmp_path / "data"), "--out", str(tmp_path), *small]


def start(flags, rank, world, port, **variables):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURMD_NODENAME": f"n{rank}",
        **variables,
    }
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *flags], env=environment, stderr=subprocess.PIPE, text=True)


def test_two_sound_nodes_are_ready(flags):
    port = free_port()
    nodes = [start(flags, rank, 2, port) for rank in range(2)]
    said = [process.communicate(timeout=PATIENCE)[1] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], said
    assert "preflight: 2 nodes are ready" in said[0] and "all-reduce, 2 nodes:" in said[0]


def test_nodes_that_never_come_are_named(flags):
    """The second of two, as the first sees it; and the first, as the second does: both wait, at the same time."""
    first = start([*flags, "--patience", "4"], 0, 2, free_port(), SLURM_JOB_NODELIST="")
    second = start([*flags, "--patience", "3"], 1, 2, free_port())
    said = first.communicate(timeout=PATIENCE)[1]
    assert first.returncode == 1
    assert "node number 1: FAILED report: no report within 4 s" in said and "--exclude" not in said
    said = second.communicate(timeout=PATIENCE)[1]
    assert second.returncode != 0 and "cannot be reached" in said


def test_bad_input(flags):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["preflight", *flags, "--patience", "0"])
    with pytest.raises(ValueError, match=r"--patience is 0.0: it must be a positive number"):
        arguments.run(arguments)


# -- this machine's GPUs ----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_flags(flags, tmp_path):
    """Flags of a cluster whose nodes are this machine; `gpu_flags(KEY=value)` says something else of it."""
    import gc

    import torch

    found = torch.cuda.device_count()
    if not found:
        pytest.skip("there is no GPU to look at")
    # What tests of this process left there would be somebody else's.
    gc.collect()
    torch.cuda.empty_cache()
    used = max(int(used) for _, _, used, _ in node_checks.query_gpus())
    if used > node_checks.IDLE_MIB:
        pytest.skip(f"a GPU has {used} MiB in use, by other tests perhaps: run this file in a process of its own")
    major, minor = torch.cuda.get_device_capability()
    facts = {"GPUS_PER_NODE": found, "GPU": "this", "GPU_ARCH": 10 * major + minor, "BANDWIDTH_FLOOR_GBS": 1}

    def with_facts(**other):
        lines = (ROOT / "launch/clusters/generic-h100.env").read_text().splitlines()
        kept = [line for line in lines if line.partition("=")[0] not in facts]
        stated = [f"{key}={value}" for key, value in (facts | other).items()]
        (tmp_path / "here.env").write_text("\n".join([*kept, *stated]) + "\n")
        return ["--cluster", str(tmp_path / "here.env"), *flags[2:]]

    return with_facts


def looked_at(flags):
    """Exit code and words of a preflight of this machine alone."""
    process = start(flags, 0, 1, 0)
    said = process.communicate(timeout=PATIENCE)[1]
    return process.returncode, said


@pytest.mark.gpu
def test_this_machines_gpus_are_ready(gpu_flags):
    import torch

    code, said = looked_at(gpu_flags())
    assert code == 0 and "preflight: 1 nodes are ready" in said, said
    count = torch.cuda.device_count()
    assert count < 2 or f"preflight: all-reduce, {count} GPUs of the node:" in said


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"GPUS_PER_NODE": 99}, "GPUs, and the cluster file says 99"),
        ({"GPU_ARCH": 70}, "and the cluster file says this (sm_70)"),
        ({"BANDWIDTH_FLOOR_GBS": 100_000}, "below the floor of 100000.0 (BANDWIDTH_FLOOR_GBS)"),
    ],
)
def test_what_is_wrong_with_this_machines_gpus_is_named(gpu_flags, facts, message):
    import torch

    if "BANDWIDTH_FLOOR_GBS" in facts and torch.cuda.device_count() < 2:
        pytest.skip("an all-reduce needs 2 GPUs")
    code, said = looked_at(gpu_flags(**facts))
    assert code == 1 and message in said, said


HOLD = "import torch; held = torch.ones(1 << 30, device='cuda:{}'); print('held', flush=True); input()"


@pytest.mark.gpu
def test_a_gpu_that_somebody_else_uses_is_named(gpu_flags):
    import torch

    last = torch.cuda.device_count() - 1
    with subprocess.Popen(
        [sys.executable, "-c", HOLD.format(last)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            code, said = looked_at(gpu_flags())
        finally:
            other.kill()
    assert code == 1 and f"GPU {last} has" in said and "MiB in use by somebody else" in said, said


def test_a_link_to_nowhere_and_a_later_megatron_core_are_named(tmp_path, monkeypatch):
    from slope_megatron import versions

    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    config = Config(train=TrainConfig(out=str(tmp_path / "runs" / "1")))
    [text] = failures(node_checks.check_disk(config, 50272))
    assert f"{tmp_path}/runs is a link to {tmp_path}/gone, which does not exist" in text
    assert not node_checks.check_megatron()
    monkeypatch.setattr(versions, "versions", lambda: {"megatron-core": "0.20.0"})
    [text] = failures(node_checks.check_megatron())
    assert text.startswith("megatron-core 0.20.0 is installed")
