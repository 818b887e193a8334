"""Fine-tuning of an exported encoder on files of SQuAD's and GLUE's form: it learns, zeros stay, adapters move."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from helpers.runs import made_run
from slope_megatron.cli import main
from slope_megatron.evaluation import fine_tuning

WORDS = "red green blue cat dog cow who what has the ? .".split()


@pytest.fixture(scope="module")
def bert(ranks, tmp_path_factory):
    """Exported folders of one BERT run: 2:4 weights with the adapters beside them, and folded."""
    from slope_megatron.export import hf_export
    from slope_megatron.export.trained_run import TrainedRun

    folder = tmp_path_factory.mktemp("bert")
    data = folder / "data"
    data.mkdir()
    write_tokenizer(data / "tokenizer.json")
    made_run(ranks, folder / "run", "bert", max_position_embeddings=48, data=data, std=0.05)
    for name, adapters, dtype in (
        *(("lora", "lora", "fp32"), ("fold", "fold", "fp32")),
        *(("bf16", "lora", "bf16"), ("fp16", "lora", "fp16")),
    ):
        hf_export.export(hf_export.plan(TrainedRun(folder / "run"), adapters=adapters, dtype=dtype), folder / name)
    return folder


def write_tokenizer(path):
    """Words as BERT's WordPiece has them: special tokens, single characters, then the words."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path))


def squad_file(path, count, seed):
    """Eight words of which one is a colour, and the question `what ?`: the answer is the colour, wherever it stands."""
    generator = torch.Generator().manual_seed(seed)
    paragraphs = []
    for number in range(count):
        words = [WORDS[3 + i] for i in torch.randint(0, 3, (8,), generator=generator)]
        place, colour = (int(torch.randint(0, high, (1,), generator=generator)) for high in (8, 3))
        words[place] = WORDS[colour]
        answer = {"text": words[place], "answer_start": len(" ".join([*words[:place], ""]))}
        question = {"id": f"{seed}.{number}", "question": "what ?", "answers": [answer]}
        paragraphs.append({"context": " ".join(words), "qas": [question]})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))


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


def test_zeros_stay_and_adapters_train(bert):
    import transformers

    from slope_megatron.evaluation.fine_tuning import FineTuning, fine_tune, open_model
    from slope_megatron.evaluation.glue import collate

    model = open_model(bert / "lora", transformers.AutoModelForSequenceClassification, num_labels=2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    samples = [{"input_ids": [2, 5 + i % 3, 3], "token_type_ids": [0, 0, 0], "label": i % 2} for i in range(8)]
    losses = fine_tune(model, samples, collate, FineTuning(1e-2, 2, 4, 16), "2:4")
    assert len(losses) == 4
    sparse = adapters = 0
    for name, parameter in model.named_parameters():
        zeros = before[name] == 0
        linear = "encoder" in name and parameter.dim() == 2 and "lora_" not in name
        if linear and float(zeros.float().mean()) == 0.5:
            sparse += 1
            assert torch.equal(parameter == 0, zeros), name
        if "lora_" in name:
            adapters += not torch.equal(parameter, before[name])
    # Two blocks of six linears; the first block's Q, K and V are dense and have no adapter.
    assert (sparse, adapters) == (9, 18)


def sentences(path):
    """SST-2's form, with fewer rows in the last batch of an epoch than in the others."""
    for split, count in (("train", 10), ("validation", 4)):
        rows = [{"sentence": f"{WORDS[i % 3]} {WORDS[3 + i % 4]} ?", "label": i % 2} for i in range(count)]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def moved(bert, tmp_path, monkeypatch):
    """Folder's name, learning rate -> shares of adapters and of kept block weights that GLUE moves; the loss."""
    from slope_megatron.evaluation import glue

    sentences(tmp_path)

    def run(name, lr):
        opened = []

        def spy(*arguments, **options):
            model = open_model(*arguments, **options)
            opened.append((model, {name: one.detach().clone() for name, one in model.named_parameters()}))
            return model

        open_model = fine_tuning.open_model
        with monkeypatch.context() as patch:
            patch.setattr(glue, "open_model", spy)
            scores = glue.evaluate(bert / name, "sst2", tmp_path, dataclasses.replace(glue.PUBLISHED, lr=lr))
        ((model, before),) = opened
        counts = {True: [0, 0], False: [0, 0]}
        for name, parameter in model.named_parameters():
            if "encoder." in name and parameter.dim() == 2:
                kept = before[name] != 0
                count = counts["lora_" in name]
                count[0] += int((parameter != before[name])[kept].sum())
                count[1] += int(kept.sum())
        return [changed / whole for changed, whole in counts.values()], scores["loss"]

    return run


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_small_updates_move_as_many_weights_of_a_16_bit_export(moved, kind):
    from slope_megatron.evaluation.glue import PUBLISHED

    expected, loss = moved("lora", PUBLISHED.lr)
    found, found_loss = moved(kind, PUBLISHED.lr)
    assert min(expected) > 0.99
    # A handful of weights may move by less than fp32 can add, in one or in the other.
    assert found == pytest.approx(expected, abs=1e-3)
    # The products are 16-bit: 8 bits of mantissa at least.
    assert found_loss == pytest.approx(loss, rel=2e-2) and found_loss != loss


def test_an_optimizer_over_16_bits_is_refused():
    from slope_megatron.evaluation.fine_tuning import FineTuning, fine_tune

    with pytest.raises(AssertionError, match="16-bit parameters would round its updates away"):
        fine_tune(torch.nn.Linear(2, 2, dtype=torch.bfloat16), [{}], dict, FineTuning(1e-3, 1, 1, 1), None)


def test_the_loss_reported_is_a_mean_over_samples():
    from slope_megatron.evaluation.fine_tuning import final_loss

    assert final_loss([(9.0, 4)] * 18 + [(2.0, 4), (1.0, 1)]) == pytest.approx((4 * 2 + 1) / 5)


@pytest.mark.parametrize("whole", ["2:8", "2:4"])
def test_zeros_of_blocks_with_patterns_of_their_own_stay(whole):
    from slope_megatron.config import parse_nm
    from slope_megatron.evaluation.fine_tuning import sparse_masks
    from slope_megatron.sparsity.pattern import magnitude_pattern

    model = torch.nn.Module()
    model.encoder = torch.nn.ModuleList(torch.nn.Linear(32, 16, bias=False) for _ in range(5))
    for linear, nm in zip(model.encoder, ("2:4", "2:8", "1:2", "5:8", None), strict=True):
        with torch.no_grad():
            if nm:
                linear.weight.mul_(magnitude_pattern(linear.weight, *parse_nm(nm)))
            else:
                linear.weight[3, 4] = 0.0  # by chance
    masks = sparse_masks(model, whole)
    expected = {linear.weight: linear.weight != 0 for linear in model.encoder[:4]}
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[weight], kept) for weight, kept in expected.items())
    assert sparse_masks(model, None) == {}


def test_a_weight_that_no_output_needs_is_left_alone():
    from slope_megatron.evaluation.fine_tuning import FineTuning, fine_tune

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.ModuleDict({name: torch.nn.Linear(8, 1) for name in ("used", "unused")})
            for linear in self.encoder.values():
                linear.weight.data[:, :4] = 0

        def forward(self, x):
            return SimpleNamespace(loss=self.encoder["used"](x).square().mean())

    model = Model()
    before = model.encoder["unused"].weight.detach().clone()
    samples = [{"x": torch.ones(8)}, {"x": torch.zeros(8)}]
    settings = FineTuning(0.1, 1, 2, 16)
    assert len(fine_tune(model, samples, lambda part: {"x": torch.stack([s["x"] for s in part])}, settings, "2:4")) == 1
    assert torch.equal(model.encoder["unused"].weight, before)
    assert not model.encoder["used"].weight[:, :4].any()


def test_the_learning_rate_rises_and_falls():
    from slope_megatron.evaluation.fine_tuning import FineTuning

    settings = FineTuning(1.0, 1, 1, 1, warmup=0.1)
    found = [settings.lr_at(step, 20) for step in range(20)]
    assert found[:3] == [0.5, 1.0, 1.0] and found[-1] == pytest.approx(1 / 18)
    assert all(found[step + 1] < found[step] for step in range(2, 19))


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
