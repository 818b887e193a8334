"""SQuAD: windows, answers, and that questions of its form are learnt."""

import json

import pytest
import torch

from helpers.small_bert import WORDS, squad_file
from slope_megatron.cli import main


def test_windows_hold_the_answer_or_point_at_the_start(bert, tmp_path):
    """A long context in windows that start `stride` tokens apart: each token of it is in one, and labels are right."""
    import transformers

    from slope_megatron.evaluation.squad import windows

    tokenizer = transformers.AutoTokenizer.from_pretrained(bert / "fold")
    words = [WORDS[i % 6] for i in range(40)]
    context = " ".join(words)
    place = len(" ".join(words[:25])) + 1
    question = {
        "id": "q",
        "question": "who ?",
        "context": context,
        "answers": [{"text": words[25], "answer_start": place}],
    }
    samples = windows(question, tokenizer, max_length=17, stride=5)
    starts = [next(span for span in sample["offsets"] if span)[0] for sample in samples]
    assert [context[:start].count(" ") for start in starts] == [5 * i for i in range(len(samples))]
    covered = {span for sample in samples for span in sample["offsets"] if span}
    assert len(covered) == 40
    labelled = [sample for sample in samples if sample["start"]]
    assert labelled and len(labelled) < len(samples)
    for sample in labelled:
        start, end = sample["offsets"][sample["start"]][0], sample["offsets"][sample["end"]][1]
        assert (start, context[start:end]) == (place, words[25])


def test_a_long_question_ends_behind_a_word_and_is_else_as_it_stands(bert):
    """Decoded tokens are another text: `?who` comes back as `? who`."""
    import transformers

    from slope_megatron.evaluation.squad import MAX_QUESTION, shortened

    tokenizer = transformers.AutoTokenizer.from_pretrained(bert / "fold")
    question = " ".join(["Red?who"] * 30)
    assert shortened(question, tokenizer) == " ".join(["Red?who"] * 21) + " Red"
    assert len(tokenizer(shortened(question, tokenizer), add_special_tokens=False)["input_ids"]) == MAX_QUESTION
    exact = " ".join(["red?"] * (MAX_QUESTION // 2))
    assert shortened(exact, tokenizer) == exact


def test_the_best_span_is_the_likeliest_one_that_may_be():
    from slope_megatron.evaluation.squad import best_span

    sample = {"context": "ab cd ef", "offsets": [None, None, (0, 2), (3, 5), (6, 8), None]}
    starts, ends = torch.tensor([9.0, 9, 0, 3, 1, 9]), torch.tensor([9.0, 9, 8, 1, 2, 9])
    # Start 3 with end 2 is backwards, everything at 0, 1 and 5 outside the context.
    assert best_span(sample, starts, ends) == (8.0, "ab")


@pytest.mark.slow
def test_squad_shaped_questions_are_learnt(bert, tmp_path, capsys):
    """`slope eval squad` on an export: nearly all unseen questions are answered, where guessing gets one in eight."""
    squad_file(tmp_path / "train.json", 256, 1)
    squad_file(tmp_path / "dev.json", 60, 2)
    flags = (
        f"--train {tmp_path}/train.json --dev {tmp_path}/dev.json --lr 1e-3 --epochs 4 --batch-size 16 --max-length 24"
    )
    assert main(["eval", "squad", str(bert / "lora"), "--run", str(bert / "run"), *flags.split()]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["scores"]["exact_match"] > 80 and said["scores"]["f1"] >= said["scores"]["exact_match"]
    kept = json.loads((bert / "run" / "scores" / "squad.json").read_text())
    assert kept["scores"] == said["scores"] and kept["settings"]["lr"] == 1e-3
