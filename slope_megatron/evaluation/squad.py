"""SQuAD v1.1: questions on a paragraph, each answered by a span of it.

A paragraph that is too long is cut into windows that start `stride` tokens apart. The answer is the span with the
highest start + end score over all windows of its question.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from slope_megatron.config.text_file import decode
from slope_megatron.data.compressed import opened
from slope_megatron.data.formats import layout_of
from slope_megatron.evaluation import metrics
from slope_megatron.evaluation.fine_tuning import FineTuning, check_exported, padded, tuned
from slope_megatron.evaluation.hub import hub_rows

HUB_NAME = "rajpurkar/squad"
PUBLISHED = FineTuning(lr=3e-5, epochs=2, batch_size=24, max_length=384)
STRIDE = 128
MAX_QUESTION, MAX_ANSWER, BEST_SPANS = 64, 30, 20


def read_questions(path: Path) -> list[dict]:
    """Questions of an official file: {id, question, context, answers: [{text, answer_start}]}.

    Raises:
        ValueError: no such file, or not of that form.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a SQuAD v1.1 JSON file, such as train-v1.1.json")
    with opened(path, layout_of(path).compressed) as file:
        content = file.read()
    try:
        articles = json.loads(decode(content))["data"]
        return [
            {"context": paragraph["context"], **{key: question[key] for key in ("id", "question", "answers")}}
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has not the form of SQuAD v1.1 ({type(error).__name__}: {error})") from None


def from_hub(split: str) -> list[dict]:
    """The same from the hub, whose answers are lists side by side."""

    def as_ours(row: dict) -> dict:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        return {**row, "answers": [{"text": text, "answer_start": start} for text, start in pairs]}

    return [as_ours(row) for row in hub_rows(HUB_NAME, None, split, "--train FILE and --dev FILE")]


def shortened(text: str, tokenizer) -> str:
    """The text of its first MAX_QUESTION tokens, back to the end of a word: as it stands there, not as they decode."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if len(encoded["input_ids"]) <= MAX_QUESTION:
        return text
    words = encoded.word_ids()
    whole = next((token for token in range(MAX_QUESTION, 0, -1) if words[token] != words[token - 1]), MAX_QUESTION)
    return text[: encoded["offset_mapping"][whole - 1][1]]


def windows(question: dict, tokenizer, max_length: int, stride: int) -> list[dict]:
    """A question's samples, with the answer's first and last token (0, [CLS], where the window has not all of it)."""
    asked = shortened(question["question"], tokenizer)
    room = max_length - len(tokenizer(asked, add_special_tokens=False)["input_ids"]) - 3
    encoded = tokenizer(
        asked,
        question["context"],
        truncation="only_second",
        max_length=max_length,
        # The library counts the tokens that two windows share.
        stride=max(0, room - stride),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    samples = []
    answer = question["answers"][0]
    first, last = answer["answer_start"], answer["answer_start"] + len(answer["text"])
    for number, offsets in enumerate(encoded["offset_mapping"]):
        kinds = encoded.sequence_ids(number)
        inside = [offset if kind == 1 else None for offset, kind in zip(offsets, kinds, strict=True)]
        start = next((i for i, span in enumerate(inside) if span and span[0] <= first < span[1]), 0)
        end = next((i for i, span in enumerate(inside) if span and span[0] < last <= span[1]), 0)
        if not (start and end):
            start = end = 0
        samples.append(
            {
                "id": question["id"],
                "context": question["context"],
                "offsets": inside,
                "input_ids": encoded["input_ids"][number],
                "token_type_ids": encoded["token_type_ids"][number]
                if "token_type_ids" in encoded
                else [int(kind == 1) for kind in kinds],
                "start": start,
                "end": end,
            }
        )
    return samples


def collate(samples: list[dict], labels: bool = True) -> dict[str, torch.Tensor]:
    batch = padded(samples)
    if labels:
        batch["start_positions"] = torch.tensor([sample["start"] for sample in samples])
        batch["end_positions"] = torch.tensor([sample["end"] for sample in samples])
    return batch


def best_span(sample: dict, starts: torch.Tensor, ends: torch.Tensor) -> tuple[float, str]:
    """Score and text of a window's best span of at most MAX_ANSWER tokens within the context."""
    offsets = sample["offsets"]
    best = (-float("inf"), "")
    for start in starts[: len(offsets)].topk(min(BEST_SPANS, len(offsets))).indices.tolist():
        for end in ends[: len(offsets)].topk(min(BEST_SPANS, len(offsets))).indices.tolist():
            if offsets[start] and offsets[end] and start <= end < start + MAX_ANSWER:
                score = float(starts[start] + ends[end])
                if score > best[0]:
                    best = (score, sample["context"][offsets[start][0] : offsets[end][1]])
    return best


def answers_of(outputs: Iterable) -> dict[str, str]:
    """Question's id -> answer: the best over its windows."""
    found: dict[str, tuple[float, str]] = {}
    for samples, output in outputs:
        for sample, starts, ends in zip(samples, output.start_logits.cpu(), output.end_logits.cpu(), strict=True):
            best = best_span(sample, starts.float(), ends.float())
            if best[0] > found.get(sample["id"], (-float("inf"), ""))[0]:
                found[sample["id"]] = best
    return {question: text for question, (_, text) in found.items()}


def evaluate(
    folder: Path,
    train: Path | None = None,
    dev: Path | None = None,
    settings: FineTuning = PUBLISHED,
    stride: int = STRIDE,
    device: str = "cpu",
) -> dict:
    """Fine-tune an exported encoder on SQuAD and score it on the development questions.

    Returns:
        {"exact_match", "f1", "loss"}: percent; the loss as `final_loss` has it.
    """
    import transformers

    fields = check_exported(folder)
    questions = {
        "train": read_questions(train) if train else from_hub("train"),
        "dev": read_questions(dev) if dev else from_hub("validation"),
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    samples = {
        split: [sample for question in asked for sample in windows(question, tokenizer, settings.max_length, stride)]
        for split, asked in questions.items()
    }
    auto = transformers.AutoModelForQuestionAnswering
    outputs, loss = tuned(folder, fields, auto, samples["train"], collate, settings, device)
    truths = {question["id"]: [answer["text"] for answer in question["answers"]] for question in questions["dev"]}
    return {**metrics.squad(answers_of(outputs(samples["dev"])), truths), "loss": loss}
