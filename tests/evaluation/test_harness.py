"""lm-evaluation-harness on a local task: our model and the harness's own Hugging Face model give the same scores."""

import json

import pytest
import torch

from helpers.runs import made_run
from slope_megatron.cli import main

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """\
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
GENERATE = """\
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory):
    """A LLaMA-shaped run in fp32, its Hugging Face and packed exports, and three local tasks."""
    from slope_megatron.data.tokenizer import train_tokenizer
    from slope_megatron.export import hf_export, packed_export
    from slope_megatron.export.trained_run import TrainedRun

    folder = tmp_path_factory.mktemp("harness")
    data = folder / "data"
    data.mkdir()
    text = "def f(x):\n    return x + 1\nfor i in range(9):\n    print(i, x)\n"
    (data / "tokenizer.model").write_bytes(train_tokenizer([text * 20], 310))
    made_run(ranks, folder / "run", "llama", vocab_size=310, max_position_embeddings=48, data=data)
    source = TrainedRun(folder / "run")
    hf_export.export(hf_export.plan(source, dtype="fp32"), folder / "hf")
    packed_export.export(source, packed_export.plan(source), folder / "packed")
    tasks = folder / "tasks"
    tasks.mkdir()
    generator = torch.Generator().manual_seed(0)
    words = "def return x print range for i in ( ) : 1 + 9".split()

    def phrase(count):
        return " ".join(words[i] for i in torch.randint(0, len(words), (count,), generator=generator))

    rows = [
        {"question": phrase(4), "choices": [" " + phrase(n) for n in (1, 2, 3)], "answer": i % 3} for i in range(24)
    ]
    (tasks / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Longer than the 48 positions: several windows.
    rows = [{"text": phrase(60), "prompt": phrase(3)} for _ in range(3)]
    (tasks / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in (("choice", CHOICE), ("text", ROLLING), ("answer", GENERATE)):
        (tasks / f"{name}.yaml").write_text(content.format(folder=tasks))
    return folder


@pytest.mark.slow
def test_both_models_score_the_same(folder, monkeypatch):
    from slope_megatron.evaluation import harness

    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    found = {}
    for name in ("hf", "packed", "run"):
        found[name] = harness.evaluate(
            folder / name,
            ["tiny_choice", "tiny_text", "tiny_answer"],
            include_path=folder / "tasks",
            few_shot=0,
            dtype="fp32",
            device="cpu",
        )
    for name in ("packed", "run"):
        assert found[name].keys() == found["hf"].keys() == {"tiny_choice", "tiny_text", "tiny_answer"}
        for task, metrics in found["hf"].items():
            # fp32 logits differ in the last digits; no choice here is that close.
            assert found[name][task] == pytest.approx(metrics, rel=1e-4), (name, task)
    assert 0 < found["hf"]["tiny_choice"]["acc"] < 1 and found["hf"]["tiny_text"]["word_perplexity"] > 1


def test_tasks_ask_for_text_in_several_ways(folder):
    """One stop may be text and no list, lengths have four names, and a prompt may be empty."""
    from types import SimpleNamespace

    from slope_megatron.evaluation.harness_model import SlopeLM
    from slope_megatron.evaluation.models import open_decoder

    model = SlopeLM(*open_decoder(folder / "packed", device="cpu"))

    def answer(context, **options):
        return model.generate_until([SimpleNamespace(args=(context, options))], disable_tqdm=True)[0]

    whole = answer("def f(x)", max_gen_toks=12)
    assert answer("def f(x)", max_new_tokens=12) == whole
    # A letter of a stop stops nothing by itself.
    assert answer("def f(x)", max_gen_toks=12, until="\0" + whole[-1]) == whole
    assert answer("def f(x)", max_gen_toks=12, until=whole[2:5]) == whole[: whole.index(whole[2:5])]
    assert answer("def f(x)", max_gen_toks=12, until=[""]) == whole
    assert isinstance(answer("", max_gen_toks=2), str)
    with pytest.raises(ValueError, match="asks for sampled text"):
        answer("def f(x)", temperature=0.7)


def test_likelihoods_are_those_of_the_definition(folder):
    """Against logits of one sequence at a time, also where a context is too long and loses its beginning."""
    from slope_megatron.evaluation.harness_model import SlopeLM
    from slope_megatron.evaluation.models import open_decoder

    decoder, tokenizer = open_decoder(folder / "packed", device="cpu")
    model = SlopeLM(decoder, tokenizer, batch_size=3)
    generator = torch.Generator().manual_seed(2)
    requests = []
    for context, continuation in ((5, 2), (3, 4), (60, 3), (1, 1), (46, 2), (2, 47)):
        parts = [torch.randint(0, 310, (count,), generator=generator).tolist() for count in (context, continuation)]
        requests.append((("", ""), *parts))
    for (_, context, continuation), (found, _) in zip(
        requests, model._loglikelihood_tokens(requests, disable_tqdm=True), strict=True
    ):
        row = (context + continuation)[-49:]
        shares = torch.log_softmax(decoder(torch.tensor([row[:-1]]))[0], -1)
        first = len(row) - len(continuation) - 1
        expected = sum(float(shares[first + i, token]) for i, token in enumerate(continuation))
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # The harness reads all of its task files first.
        pytest.param(
            "{hf} --tasks no_such_task",
            "--tasks names no_such_task, which lm-evaluation-harness has not",
            marks=pytest.mark.slow,
        ),
        ("{tasks}", "is no run, packed model or Hugging Face model"),
        ("{packed} --run {hf}/nowhere", "nowhere is no folder"),
    ],
)
def test_bad_input_is_one_sentence(folder, capsys, arguments, message):
    places = {name: folder / name for name in ("hf", "packed", "tasks")}
    assert main(["eval", "lm", *arguments.format(**places).split()]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1 and message in said[0]


@pytest.mark.slow
def test_an_unreachable_hub_is_one_sentence(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    assert main(["eval", "lm", str(folder / "packed"), "--tasks", "piqa", "--limit", "1"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1 and "the data of piqa is neither in the local cache nor can the hub be reached" in said[0]
