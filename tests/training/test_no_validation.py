"""Runs without validation: because the data has no such split, or because none is asked for."""

import json

import pytest

from helpers import commands
from slope_megatron.config import TrainConfig
from slope_megatron.data.prepare import prepare
from slope_megatron.evaluation.run_report import write_report

RUN = (
    "--num-layers 1 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-multiple 48 --micro-batch-size 2 "
    "--global-batch-size 2 --steps 2 --warmup-steps 0 --eval-interval 1 --log-interval 1"
).split()


@pytest.mark.parametrize("percent", [0, 10])
def test_a_run_trains_saves_resumes_and_reports(tmp_path, percent):
    records = "".join(json.dumps({"text": f"record {number} " * 20}) + "\n" for number in range(40))
    (tmp_path / "c.jsonl").write_text(records)
    source, data = str(tmp_path / "c.jsonl"), tmp_path / "data"
    prepare(source, data, vocab_size=280, valid_percent=percent, test_percent=0, workers=1)
    flags = ["--data", data, *RUN, "--out", tmp_path / "run", *([] if percent == 0 else ["--eval-samples", 0])]
    done = commands.slope("pretrain", *flags, "--stop-at", 1)
    assert done.returncode in (0, 75), done.stderr
    said = "was prepared with --valid-percent 0: nothing is validated"
    assert done.stderr.count(said) == (percent == 0)
    done = commands.slope("pretrain", *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert "step 2, nothing validated" in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["val_loss"], summary["unigram_entropy"]) == (2, None, None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert not any("val_loss" in line for line in lines)
    assert "| - | - | 2 |" in write_report([tmp_path / "run"], tmp_path / "report").read_text()


def test_fewer_than_none_is_refused():
    with pytest.raises(ValueError, match="--eval-samples is -1: it must be at least 1, or 0 to validate nothing"):
        TrainConfig(eval_samples=-1)
