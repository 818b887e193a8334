"""The scripts of `examples/` run as they stand; README shows lines of them."""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from integrations.test_upstream_scripts import checkout_of, losses

from slope_megatron.integrations.megatron_lm import plugin
from slope_megatron.launch.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
TINY = "--num-layers 1 --hidden-size 64 --num-attention-heads 2 --seq-length 32".split()


def start(*command, **environment) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [*map(str, command)],
        env={**os.environ, "PYTHONPATH": PATHS, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def commands(tmp_path):
    """A folder for the front of PATH; its `slope` is this checkout's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_command(folder / "slope", f'exec {sys.executable} -m slope_megatron "$@"')
    return folder


def write_command(path: Path, line: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{line}\n")
    path.chmod(0o755)


def search_path(folder: Path) -> str:
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


def test_the_layer_spec_learns_and_its_weights_load_again():
    said = start(sys.executable, "-W", "ignore", EXAMPLES / "layer_spec.py").stdout
    first, last = (float(word) for word in said.split(";")[0].removeprefix("loss ").split(" -> "))
    # The first is near the log of 128 tokens, 4.85.
    assert 4.7 < first < 5.1 and last < 1.0
    assert said.endswith("the next loss differs by 0.0\n")


def test_a_spec_whose_norm_was_within_the_linear_is_refused():
    """As in Transformer Engine's specs, whose own norm is nothing there."""
    code = (
        "import sys, pytest; sys.path.insert(0, 'examples'); import layer_spec\n"
        "from megatron.core.transformer.identity_op import IdentityOp\n"
        "stock = layer_spec.sparse_spec\n"
        "def spec():\n"
        "    found = stock(); found.submodules.pre_mlp_layernorm = IdentityOp; return found\n"
        "layer_spec.sparse_spec = spec; layer_spec.start_ranks()\n"
        "with pytest.raises(ValueError, match=r'decoder.layers.0.pre_mlp_layernorm is an IdentityOp in front of a'):\n"
        "    layer_spec.build()\n"
        "print('refused')\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
    )
    assert result.stdout.endswith("refused\n"), result.stderr[-3000:]


def losses_of(said: str) -> list[float]:
    """First and last, of the last line that tells them."""
    line = [line for line in said.splitlines() if line.startswith("loss ")][-1]
    return [float(word) for word in line.split(";")[0].removeprefix("loss ").split(" -> ")]


@pytest.mark.parametrize("name", ("library", "hf_trainer", "fsdp2"))
def test_a_hugging_face_model_learns(name):
    first, last = losses_of(start(sys.executable, "-W", "ignore", EXAMPLES / f"{name}.py").stdout)
    # The first is near the log of 128 tokens, 4.85.
    assert 4.7 < first < 5.1 and last < first - 1.0


@pytest.mark.slow
def test_two_ranks_of_fsdp2_print_what_one_prints():
    one = start(sys.executable, "-W", "ignore", EXAMPLES / "fsdp2.py").stdout
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    two = start(sys.executable, "-W", "ignore", *ranks, EXAMPLES / "fsdp2.py").stdout
    assert losses_of(two) == pytest.approx(losses_of(one), abs=0.002)


@pytest.mark.slow
def test_pretrain_goes_from_text_to_exports(texts, commands, tmp_path):
    out = tmp_path / "out"
    flags = [*TINY, "--steps", "4"]
    result = start(EXAMPLES / "pretrain.sh", texts, out, *flags, PATH=search_path(commands), RANKS="2")
    assert json.loads((out / "run" / "summary.json").read_text())["tokens"] == 4 * 16 * 32
    assert "tokens in" in result.stdout + result.stderr
    for folder in ("exported", "packed"):
        assert (out / folder / "model.safetensors").is_file()


def test_megatron_lm_flags_are_the_plugins():
    """The script needs a checkout of Megatron-LM; that its --slope flags exist can be seen without one."""
    parser = plugin.add_slope_arguments(argparse.ArgumentParser())
    known = {flag for action in parser._actions for flag in action.option_strings}
    used = {word for word in (EXAMPLES / "megatron_lm.sh").read_text().split() if word.startswith("--slope")}
    assert {"--slope", "--slope-adapter-rank"} <= used <= known


@pytest.mark.slow
@pytest.mark.parametrize("version", ["core_v0.16.1", "main_d98e8a64"])
def test_megatron_lm_trains(version, texts, commands, tmp_path):
    """On the CPU: `torchrun` is exchanged for one rank whose `cuda` is the CPU."""
    checkout = checkout_of(version, "pretrain_gpt", tmp_path).parent
    starter = ROOT / "tests" / "helpers" / "cpu_for_cuda.py"
    write_command(
        commands / "torchrun",
        f'PYTHONPATH=$PYTHONPATH:{ROOT / "tests"} exec {sys.executable} {starter} "$PWD" "$PWD/$3" "${{@:4}}" '
        "--distributed-backend gloo",
    )
    data = tmp_path / "data"
    start(commands / "slope", "data", "prepare", texts, "--out", data, "--vocab-size", "512")
    flags = [*TINY, "--max-position-embeddings", "32", "--micro-batch-size", "1", "--global-batch-size", "4"]
    flags += "--train-iters 12 --log-interval 1 --no-masked-softmax-fusion --no-bias-gelu-fusion".split()
    flags += "--no-bias-dropout-fusion --no-bias-swiglu-fusion --no-rope-fusion --num-workers 0".split()
    flags += ["--slope-lazy-fraction", "0.25", "--no-create-attention-mask-in-dataloader"]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TORCHDYNAMO_DISABLE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    result = start(EXAMPLES / "megatron_lm.sh", checkout, data, *flags, PATH=search_path(commands), **rank)
    found = losses(result)
    assert len(found) == 12 and found[-1] < found[0]
    assert "the adapters join" in result.stdout + result.stderr
