"""GLUE: sentences and pairs of them, classified (STS-B: scored); each task by its own metric."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from slope_megatron.data.formats import layout_of
from slope_megatron.data.records import BadRecord, read_rows
from slope_megatron.evaluation import metrics
from slope_megatron.evaluation.fine_tuning import FineTuning, check_exported, padded, tuned
from slope_megatron.evaluation.hub import hub_rows

HUB_NAME = "nyu-mll/glue"
PUBLISHED = FineTuning(lr=2.4e-6, epochs=3, batch_size=4, max_length=128)


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Args:
        texts: columns of the sentence, or of both.
        labels: classes; 1: a number.
        metric: of (predictions, labels), in percent.
        epochs: published.
        splits: to score on.
    """

    texts: tuple[str, ...]
    labels: int
    metric: Callable[[list, list], dict[str, float]]
    epochs: int = 3
    splits: tuple[str, ...] = ("validation",)


PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Task(("sentence",), 2, metrics.matthews, epochs=5),
    "sst2": Task(("sentence",), 2, metrics.accuracy),
    "mrpc": Task(PAIR, 2, metrics.accuracy_and_f1, epochs=5),
    "stsb": Task(PAIR, 1, metrics.correlations),
    "qqp": Task(("question1", "question2"), 2, metrics.accuracy_and_f1),
    "rte": Task(PAIR, 2, metrics.accuracy),
    "mnli": Task(
        ("premise", "hypothesis"), 3, metrics.accuracy, splits=("validation_matched", "validation_mismatched")
    ),
    "qnli": Task(("question", "sentence"), 2, metrics.accuracy),
}


def read_split(name: str, split: str, data: Path | None) -> list[dict]:
    """Rows {text columns, label} of a local `data`/SPLIT.jsonl (or .json, .parquet, packed or not), or from the hub.

    Raises:
        ValueError: no such file, a row without a column, or an unreachable hub.
    """
    if data is None:
        return hub_rows(HUB_NAME, name, split, "--data FOLDER with train.jsonl and validation.jsonl")
    path = split_file(name, split, data)
    way_out = 'each record is a row such as {"label": 0, ...}'
    rows = []
    for number, row in read_rows(path, layout_of(path), way_out):
        if isinstance(row, BadRecord):
            raise ValueError(str(row))
        missing = [key for key in (*TASKS[name].texts, "label") if key not in row]
        if missing:
            raise ValueError(f"{path}:{number} has no {missing[0]!r}: {name} has {(*TASKS[name].texts, 'label')}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no row: {way_out}")
    return rows


def split_file(name: str, split: str, data: Path) -> Path:
    """The one file of `data` that is named after a split and holds records, packed or not.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [
        path
        for path in sorted(data.glob(f"{split}.*"))
        if path.name.lower().split(".")[0] == split and layout_of(path).format in ("json", "parquet")
    ]
    if not found:
        wanted = " and ".join(f"{part}.jsonl" for part in ("train", *TASKS[name].splits))
        raise ValueError(f"{data / split}.jsonl is no file: --data wants {wanted} in one folder, or .json, or .parquet")
    if len(found) > 1:
        raise ValueError(f"{data} has {found[0].name} and {found[1].name}: leave one of them there")
    return found[0]


def encode(row: dict, task: Task, tokenizer, max_length: int) -> dict:
    encoded = tokenizer(*(row[key] for key in task.texts), truncation=True, max_length=max_length)
    ids = encoded["input_ids"]
    return {
        "input_ids": ids,
        "token_type_ids": encoded.get("token_type_ids", [0] * len(ids)),
        "label": float(row["label"]) if task.labels == 1 else int(row["label"]),
    }


def collate(samples: list[dict], labels: bool = True) -> dict[str, torch.Tensor]:
    batch = padded(samples)
    if labels:
        batch["labels"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def evaluate(
    folder: Path, name: str, data: Path | None = None, settings: FineTuning = PUBLISHED, device: str = "cpu"
) -> dict:
    """Fine-tune an exported encoder on one task and score it.

    Returns:
        the task's metrics in percent (MNLI's mismatched ones end in `_mismatched`); "loss" as `final_loss` has it.
    Raises:
        ValueError: what `check_exported` and `read_split` raise, or an unknown task.
    """
    import transformers

    if name not in TASKS:
        raise ValueError(f"--task is {name}: it must be one of {', '.join(TASKS)}")
    task = TASKS[name]
    fields = check_exported(folder)
    rows = {split: read_split(name, split, data) for split in ("train", *task.splits)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    samples = {
        split: [encode(row, task, tokenizer, settings.max_length) for row in part] for split, part in rows.items()
    }
    auto = transformers.AutoModelForSequenceClassification
    outputs, loss = tuned(folder, fields, auto, samples["train"], collate, settings, device, num_labels=task.labels)
    scores: dict[str, float] = {}
    for split in task.splits:
        predictions: list = []
        for _, output in outputs(samples[split]):
            found = output.logits[:, 0].float() if task.labels == 1 else output.logits.argmax(-1)
            predictions += found.tolist()
        suffix = "_mismatched" if split.endswith("_mismatched") else ""
        labels = [sample["label"] for sample in samples[split]]
        scores.update({key + suffix: value for key, value in task.metric(predictions, labels).items()})
    return {**scores, "loss": loss}
