"""GLUE: tasks of its form are learnt; and what `slope eval` refuses."""

import json

import pytest
import torch

from helpers.small_bert import WORDS
from slope_megatron.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mrpc", "stsb", "mnli"])
def test_glue_shaped_tasks_are_learnt(bert, tmp_path, capsys, task):
    """The label says something of the second sentence's words: of one of them, or of their sum (STS-B)."""
    from slope_megatron.evaluation.glue import TASKS

    generator = torch.Generator().manual_seed(4)
    for split, count in (("train", 192), *((split, 48) for split in TASKS[task].splits)):
        rows = []
        for _ in range(count):
            first, second = (torch.randint(0, 3, (2,), generator=generator).tolist() for _ in range(2))
            label = {"mrpc": int(second[0] == 0), "stsb": float(sum(second)), "mnli": second[0]}[task]
            texts = (" ".join(WORDS[i] for i in words) for words in (first, second))
            rows.append({**dict(zip(TASKS[task].texts, texts, strict=True)), "label": label})
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--data {tmp_path} --lr 1e-3 --epochs 5 --batch-size 16 --max-length 16"
    assert main(["eval", "glue", str(bert / "fold"), "--task", task, *flags.split()]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    keys = {"mrpc": {"accuracy", "f1"}, "stsb": {"pearson", "spearman"}, "mnli": {"accuracy", "accuracy_mismatched"}}[
        task
    ]
    assert scores.keys() == keys | {"loss"}
    assert all(scores[key] > 75 for key in keys), scores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("squad {run}", "is a run: fine-tuning reads an exported model; write one with `slope export hf"),
        ("squad {fold} --train {fold}/config.json", "--train and --dev go together"),
        ("squad {fold} --train {fold}/config.json --dev {fold}/config.json", "has not the form of SQuAD v1.1"),
        ("squad {fold}", "rajpurkar/squad is neither in the local cache nor can the hub be reached"),
        ("glue {fold} --task snli", "--task is snli: it must be one of cola, sst2"),
        ("glue {fold} --task rte", "nyu-mll/glue:rte is neither in the local cache"),
        ("glue {fold} --task rte --data {fold}", "train.jsonl is no file: --data wants"),
        ("glue {fold} --task rte --lr 0", "--lr is 0.0: it must be positive"),
        ("glue {fold} --task rte --epochs 0", "--epochs is 0: it must be positive"),
        ("glue {fold} --task rte --data {fold}/rows", "rows/train.jsonl:2 is no JSON: each record is a row"),
        ("glue {fold} --task cola --data {fold}/latin", "latin/train.jsonl:1 is no JSON in UTF-8"),
        ("lm {fold} --limit 0", "--limit is 0: it must be at least 1"),
        ("lm {fold} --include-path nowhere", "--include-path nowhere is no folder"),
    ],
)
def test_bad_input_is_one_sentence(bert, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {name: bert / name for name in ("run", "fold")}
    for name, content in (("rows", b'{"sentence1": "a", "sentence2": "b", "label": 0}\n[\n'), ("latin", b"{\xe9")):
        (places["fold"] / name).mkdir(exist_ok=True)
        (places["fold"] / name / "train.jsonl").write_bytes(content)
    assert main(["eval", *arguments.format(**places).split()]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1 and message in said[0]
