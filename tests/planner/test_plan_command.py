"""`slope plan`: what it prints, writes and refuses, and its counts beside a built model and a real run."""

import argparse
import dataclasses
import json
import sysconfig
from pathlib import Path

import pytest

from helpers import commands
from slope_megatron.cli import plan
from slope_megatron.launch.cluster import machine, read_cluster
from slope_megatron.planner import plan as planner


def slope_plan(*flags):
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["plan", *map(str, flags)])
    return arguments.run(arguments)


MODEL = "--num-layers 4 --hidden-size 768 --num-attention-heads 12 --seq-length 256 --global-batch-size 48".split()


def test_the_command_prints_writes_and_recommends(tmp_path, capsys):
    files = ["--json", tmp_path / "rows.json", "--png", tmp_path / "plan.png"]
    assert slope_plan("--cluster", "narval", "--nodes", 2, *MODEL, *files, "--find-nodes") == 0
    said = capsys.readouterr().out
    assert "2:4: take TP" in said and "the fewest, any layout: 1 nodes" in said and "assumed: MFU 0.4" in said
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["kind"] for row in rows} == {"dense", "sparse"}
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert slope_plan("--cluster", "narval", "--nodes", 2, *MODEL, "--tensor-parallel", 2, "--flags") == 0
    assert capsys.readouterr().out.startswith("--tensor-parallel 2 --sequence-parallel")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", 9], "--nodes is 9: lonestar6 gives a job 1 to 8 nodes"),
        (["--gpu", "h100"], "--cluster and --gpu are both given: one takes the other's place; give one"),
        (["--nodes", 1, "--gpus", 3], "--nodes and --gpus are both given"),
        (
            ["--gpus", 4],
            "--gpus is 4: lonestar6 has 3 in a node and 8 nodes for a job; give 1 to 3, or a multiple of 3",
        ),
        (["--gpus", 27], "--gpus is 27: lonestar6 has 3 in a node and 8 nodes for a job"),
        (["--gpus", 0], "--gpus is 0: lonestar6 has 3 in a node"),
        (["--mfu", 40], "--mfu is 40.0: it is a share"),
        (["--sparse-speedup", 0], "--sparse-speedup is 0.0: it must be a positive number"),
        (["--sparse-speedup", "nan"], "--sparse-speedup is nan: it must be a positive number"),
        (["--vocabulary", -5], "--vocabulary is -5: it must be a number of tokens from 1 on"),
        (["--png", "/nowhere/plan.png"], "--png /nowhere/plan.png: there is no folder /nowhere; make it first"),
        (["--json", "/"], "--json / is a folder: give a file in it"),
        (["--tensor-parallel", 2], "no layout of 1 x 3 = 3 GPUs has tensor 2"),
        (["--rates", "nowhere.csv"], "--rates nowhere.csv does not exist"),
        (["--check", "nowhere"], "--check nowhere has no run.json"),
    ],
)
def test_bad_input_is_one_sentence(flags, message):
    with pytest.raises(ValueError) as error:
        slope_plan("--cluster", "lonestar6", *MODEL, *flags)
    assert message in str(error.value)


@pytest.mark.parametrize(("flags", "expected"), [([], 300), (["--vocab-size", 900], 900), (["--vocabulary", 5], 5)])
def test_the_vocabulary_is_the_one_that_training_would_take(flags, expected, tmp_path, monkeypatch):
    """`--vocab-size` counts in training whatever the data's tokenizer has: it may only be larger."""
    (tmp_path / "manifest.json").write_text('{"vocab_size": 300}')
    seen = []
    monkeypatch.setattr(planner, "rows", lambda question, *_: seen.append(question.vocabulary) or [])
    with pytest.raises(ValueError, match="no layout"):
        slope_plan("--cluster", "narval", *MODEL, "--tensor-parallel", 3, "--data", tmp_path, *flags)
    assert seen == [expected]


def test_counts_are_those_of_the_model_package(capsys):
    """The same configuration built by megatron-core on the meta device: equal to the element."""
    flags = ["--tensor-parallel", 2, "--slope-adapter-rank", 8, "--check-build", "--vocabulary", 500]
    assert slope_plan(*MODEL, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[-1] == "0.000%" for line in lines[1:])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slope", "sste"])
def test_state_bytes_are_those_of_a_real_run(method, tmp_path, capsys):
    """One step of `slope pretrain`, sparse with adapters: what it measured, to the byte."""
    from slope_megatron.data.prepare import prepare

    (tmp_path / "texts").mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        (tmp_path / "texts" / path.name).write_bytes(path.read_bytes())
    prepare(str(tmp_path / "texts"), tmp_path / "data", vocab_size=512, valid_percent=10.0)
    small = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-multiple 48 --steps 4"
    run = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--stop-at", 1, "--slope-adapter-rank", 4]
    run += ["--slope-method", method]
    done = commands.slope("pretrain", *small.split(), *run)
    assert done.returncode == 0, done.stderr
    assert slope_plan("--check", tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.split()[-1] == "0.000%" for line in lines[1:])
    assert slope_plan("--check", tmp_path / "run", "--vocabulary", 5000) == 1, "another model is noticed"


def test_a_run_of_another_version_is_checked_or_refused(tmp_path):
    from slope_megatron.config import Config, ParallelConfig
    from slope_megatron.config.saved import saved_form
    from slope_megatron.planner.state_check import read_run

    config = Config(parallel=ParallelConfig(tensor_parallel=2))
    described = saved_form(config.to_dict())
    del described["config"]["slope"]["fp8"], described["config"]["watch"]
    described["config"]["parallel"]["later"] = 2
    for name, content in (("run.json", described), ("summary.json", {})):
        (tmp_path / name).write_text(json.dumps(content))
    assert read_run(tmp_path) == (config, {})
    described["config_active"].append("parallel.later")
    (tmp_path / "run.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"settings that this version does not have \(parallel.later 2\)"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ((), {"stage": 1}),
        (("--zero-stage", 2, "--offload-optimizer", "cpu"), {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
        (("--zero-stage", 3), {"stage": 3}),
    ],
)
def test_deepspeed_s_configuration_is_shown(flags, settings, capsys):
    """The JSON of the layout: the batch is micro-batch x accumulation x data-parallel ranks."""
    given = ["--cluster", "narval", "--nodes", 2, *MODEL[:-1], 64, "--tensor-parallel", 2, "--pipeline-parallel", 1]
    assert slope_plan(*given, *flags, "--print-deepspeed-config") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] * 4 == 64
    assert found["bf16"]["enabled"]
    zero = found["zero_optimization"]
    assert zero["stage"] == settings["stage"]
    assert ("offload_optimizer" in zero) == ("offload_optimizer" in settings)


@pytest.mark.parametrize(("gpus", "found"), [(1, (1, 1)), (6, (1, 6)), (16, (2, 8))])
def test_a_gpu_s_name_and_number_are_a_cluster(gpus, found):
    cluster, nodes = machine(None, "h100", None, gpus)
    assert (nodes, cluster.gpus_per_node) == found
    assert dataclasses.replace(cluster, gpus_per_node=8) == read_cluster("generic-h100")


def test_an_unknown_gpu_names_the_known_ones():
    with pytest.raises(ValueError, match=r"--gpu is 'b300': it must be one of a100, h100.*; for others write an .env"):
        slope_plan("--gpu", "b300", *MODEL)


def test_one_gpu_is_planned_without_a_cluster(capsys):
    assert slope_plan("--gpu", "h100", "--gpus", 1, *MODEL) == 0
    said = capsys.readouterr().out
    assert said.startswith("generic-h100: 1 nodes x 1 H100") and "2:4: take TP1 PP1 DP1 ZeRO-1" in said


@pytest.mark.parametrize("cluster", ["narval", "generic-h100"])
def test_no_pruned_wgrad_is_counted_where_the_metadata_is_not_known(cluster, capsys):
    seconds = {}
    for mode in ("paper", "full"):
        flags = ["--cluster", cluster, *MODEL, "--slope-mode", mode, "--tensor-parallel", 1, "--mfu", 0.4]
        assert slope_plan(*flags) == 0
        said = capsys.readouterr().out
        assert ("mode full: wgrad counts as dense" in said) == (mode == "full" and cluster == "narval")
        seconds[mode] = [line for line in said.splitlines() if line.startswith("TP1 ")]
    assert (seconds["paper"] == seconds["full"]) == (cluster == "narval")


def test_this_repositorys_own_products_are_taken_on_their_architecture(capsys):
    for cluster, flags, said in (
        ("generic-h100", [], "products of "),
        ("generic-h100", ["--mfu", 0.5], "assumed: MFU 0.5"),
        ("narval", [], "assumed: MFU 0.4"),
    ):
        assert slope_plan("--cluster", cluster, *MODEL, *flags) == 0
        assert f"times are estimates; {said}" in capsys.readouterr().out
