"""The upstream's own training configurations: how many `--slope` takes, and that each combination of theirs runs.

On CPU ranks, those of Transformer Engine with a stand-in for it in plain torch.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from integrations.test_patches import FOLDER
from integrations.test_upstream_layouts import STAND_IN
from integrations.test_upstream_scripts import HELPERS, ROOT, checkout_of

from helpers.upstream_configurations import TOY, Toy, changed, combinations, configurations, passed, problems, table
from slope_megatron.launch.ports import free_port

# Two steps take seconds; a run that waits for a rank which is gone never ends.
PATIENCE = 120


def test_the_selection_is_the_220_that_train():
    assert len(configurations()) == 220
    assert sum("transformer_impl" not in values for values in configurations().values()) == 202


def test_no_change_takes_a_configuration_away():
    counts = passed()
    assert counts == sorted(counts) and counts[0] >= 174 and counts[-1] >= 189
    assert passed(()) == [220] * len(counts)


def test_the_numbers_of_the_page_are_these():
    assert table() in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("gpt/gpt3_mcore_te_tp2_pp2_mla", "multi_latent_attention"),
        ("gpt/gpt3_mcore_te_tp1_pp1_mup", "use_mup"),
        ("gpt/gpt3_mcore_te_tp2_pp1_gdn", "experimental_attention_variant"),
    ],
)
def test_what_stays_refused_is_refused_by_name(name, refused):
    assert refused in problems(changed(configurations()[name]))


def start(script: Path, runs: Path, rank: int, world: int) -> subprocess.Popen:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHDYNAMO_DISABLE": 1, "CUDA_DEVICE_MAX_CONNECTIONS": 1}
    # What --deterministic-mode asks for.
    environment |= {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests", STAND_IN)))}
    command = [sys.executable, "-W", "ignore", HELPERS / "upstream_in_turn.py", script.parent, script, runs]
    out = (runs.parent / f"rank{rank}.log").open("w")
    return subprocess.Popen(
        command, env={**os.environ, **{key: str(value) for key, value in environment.items()}}, stdout=out, stderr=out
    )


def in_turn(script: Path, toys: list[Toy], folder: Path) -> dict[Toy, str]:
    """What the last rank said of each toy; they are of one world. After one that fails, the others go on."""
    said: dict[Toy, str] = {}
    while waiting := [each for each in toys if each not in said]:
        runs, world = folder / "runs.json", waiting[0].world
        runs.write_text(json.dumps([{"port": free_port(), "flags": [*TOY, *each.flags]} for each in waiting]))
        with contextlib.ExitStack() as ranks:
            processes = [ranks.enter_context(start(script, runs, rank, world)) for rank in range(world)]
            try:
                failed = processes[-1].wait(timeout=PATIENCE + 30 * len(waiting)) != 0
            except subprocess.TimeoutExpired:
                failed = True
            for process in processes:
                process.kill()
        logs = [(folder / f"rank{rank}.log").read_text() for rank in reversed(range(world))]
        parts = re.split(r"^== run \d+\n", logs[0], flags=re.MULTILINE)[1:] or [logs[0]]
        said |= dict(zip(waiting, parts, strict=False))
        if failed:  # with what the other ranks met
            last = waiting[len(parts) - 1]
            said[last] = "failed\n" + "\n".join(log[-2000:] for log in logs)
    return said


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    """Of every combination, run when the first of its world is asked for."""
    folder, found = tmp_path_factory.mktemp("upstream"), {}
    script = checkout_of("main_d98e8a64", "pretrain_gpt", folder)

    def of(toy: Toy) -> str:
        if toy not in found:
            alike = [each for each in combinations() if each.world == toy.world and runs_on_a_cpu(each)]
            found.update(in_turn(script, alike, folder))
        return found[toy]

    return of


def runs_on_a_cpu(toy: Toy) -> bool:
    # The one wants the fused gradient accumulation of apex or Transformer Engine; the upstream refuses the others at
    # this size, where replicas of attention are not as many as those of experts.
    mapped = {"--context-parallel-size", "--use-tp-pp-dp-mapping"} <= set(toy.flags)
    return "--defer-embedding-wgrad-compute" not in toy.flags and not mapped


def losses(said: str) -> list[float]:
    return [float(text) for text in re.findall(r"lm loss: (\S+)", said)]


@pytest.mark.slow
@pytest.mark.parametrize("toy", combinations(), ids=lambda toy: f"{toy.world}:" + " ".join(toy.flags))
def test_a_combination_of_features_trains_two_steps(toy, outcomes):
    if not runs_on_a_cpu(toy):
        pytest.skip("it wants apex or Transformer Engine on a GPU, or more ranks")
    said = outcomes(toy)
    # The logarithm of 128 entries is 4.85, and the weights are small.
    assert len(losses(said)) == 2 and all(4.7 < loss < 5.0 for loss in losses(said)), said[-6000:]


# Of a bf16 loss near 4.85, whose tokens' logits differ by some roundings of 2^-9 between layouts; the second step's
# weights have moved by Adam, which takes the sign of a small gradient for its size.
FIRST_STEP, SECOND_STEP = 2e-3, 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted({toy.model for toy in combinations()}), ids=" ".join)
def test_every_layout_of_a_model_has_its_losses(model, outcomes):
    alike = [toy for toy in combinations() if toy.model == model and runs_on_a_cpu(toy)]
    if len(alike) < 2:
        pytest.skip("one layout of this model is all that there is")
    first, *others = (losses(outcomes(toy)) for toy in alike)
    for found in others:
        assert found[0] == pytest.approx(first[0], rel=FIRST_STEP)
        assert found[1] == pytest.approx(first[1], rel=SECOND_STEP)
