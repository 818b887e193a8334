"""BERT's whole way, scaled down: text -> phase 1 -> phase 2 -> Hugging Face -> questions answered."""

import json
import math
from pathlib import Path

import pytest

from helpers import commands
from helpers.small_bert import WORDS, squad_file
from slope_megatron.cli import main

ROOT = Path(__file__).resolve().parents[2]
# The published learning rate belongs to batches of thousands.
SCALE = ["--scale", "0.0005", "--dtype", "fp32", "--eval-samples", 8, "--steps", 60, "--lr", "0.02"]


def slope(*arguments):
    """A `slope` command in a process of its own."""
    done = commands.slope(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_both_phases_and_squad(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(120):
        words = [WORDS[(number * step + step) % 10] for step in range(1, 9)]
        (texts / f"{number:03}.txt").write_text((" ".join(words) + ".\n") * 12)
    data = tmp_path / "data"
    slope("data", "prepare", texts, "--kind", "bert", "--vocab-size", 64, "--valid-percent", 10, "--out", data)
    recipe = [f"launch/recipes/bert-large-phase{phase}.yaml" for phase in (1, 2)]
    runs = [tmp_path / f"phase{phase}" for phase in (1, 2)]
    slope("pretrain", "--config", ROOT / recipe[0], *SCALE, "--data", data, "--out", runs[0])
    flags = ["--init-from", runs[0], "--slope-lazy-fraction", 0.25]
    said = slope("pretrain", "--config", ROOT / recipe[1], *SCALE, *flags, "--data", data, "--out", runs[1])
    assert "weights and patterns of" in said
    first, second = (json.loads((run / "summary.json").read_text()) for run in runs)
    # Guessing among all rows of the padded vocabulary costs log 384.
    assert second["val_loss"] < first["val_loss"] < math.log(384) - 1.0
    metrics = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["adapters"] for line in metrics if "loss" in line][-1] is True

    exported = tmp_path / "hf"
    assert main(["export", "hf", str(runs[1]), str(exported), "--adapters", "lora"]) == 0
    squad_file(tmp_path / "train.json", 128, 1)
    squad_file(tmp_path / "dev.json", 40, 2)
    files = ["--train", str(tmp_path / "train.json"), "--dev", str(tmp_path / "dev.json")]
    settings = "--lr 1e-3 --epochs 6 --batch-size 16 --max-length 24".split()
    capsys.readouterr()
    assert main(["eval", "squad", str(exported), "--run", str(runs[1]), *files, *settings]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    # Guessing one of the eight words answers one in eight.
    assert scores["f1"] > 40.0
    assert json.loads((runs[1] / "scores" / "squad.json").read_text())["scores"] == scores
