"""`slope export`, `import` and `generate` as they are called, and what they refuse."""

import json
import re
import shlex
import shutil

import pytest
import torch

from helpers.families import hf_config
from helpers.runs import edit_state, made_run
from slope_megatron.cli import main, parse
from slope_megatron.config.yaml_file import read_yaml


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a tokenizer of 90 entries is too small for bytes: 300, and models of that vocabulary."""
    from slope_megatron.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("data")
    (folder / "tokenizer.model").write_bytes(
        train_tokenizer(["def f(x):\n    return x + 1\n" * 20, "for i in x: i\n"], 300)
    )
    return folder


@pytest.fixture(scope="module")
def run(ranks, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    made_run(ranks, folder, "opt", vocab_size=300, max_position_embeddings=64, data=data)
    return folder


def refused(capsys, *arguments) -> str:
    assert main([*map(str, arguments)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("slope: error: ")]
    assert len(said) == 1
    return said[0]


def test_a_dry_run_says_what_would_be_written(run, tmp_path, capsys):
    for form in ("hf", "packed"):
        assert main(["export", form, str(run), str(tmp_path / form), "--dry-run"]) == 0
        dry = capsys.readouterr().out
        assert not (tmp_path / form).exists()
        assert main(["export", form, str(run), str(tmp_path / form)]) == 0
        assert capsys.readouterr().out == dry
        for line in dry.splitlines()[1:]:
            name = line.split()[0]
            assert name == "sparse" or (tmp_path / form / name).is_file(), line
        named = {line.split()[0] for line in dry.splitlines()}
        assert {path.name for path in (tmp_path / form).iterdir()} <= named


def test_runs_and_packed_models_of_other_versions(run, tmp_path, capsys):
    """Older than a setting: read as before it; with an architecture that this version cannot know: refused."""
    old, packed = shutil.copytree(run, tmp_path / "old"), tmp_path / "packed"
    (folder,) = (old / "checkpoints").glob("step_*")
    edit_state(folder, slope={"fp8": ...}, model={"norm_eps": ..., "rotary_base": ...}, train={"later": 1}, watch=None)
    assert main(["export", "packed", str(old), str(packed)]) == 0
    config = json.loads((packed / "config.json").read_text())
    assert "model.hidden_size" in config["config_active"] and "model.norm_eps" not in config["config_active"]
    del config["model"]["norm_eps"]
    config["model"]["next_tokens"] = False
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "checksums.json").unlink()
    assert main(["generate", str(packed), "--prompt", "def f", "--max-tokens", "2"]) == 0
    edit_state(folder, model={"next_tokens": True}, active=("model.next_tokens",))
    config["config_active"].append("model.next_tokens")
    (packed / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    said = r"settings that this version does not have (model.next_tokens {}): use the version that wrote it"
    assert said.format("True") in refused(capsys, "export", "hf", old, tmp_path / "hf")
    assert said.format("False") in refused(capsys, "generate", packed, "--prompt", "def f")


def test_generate_from_a_run_and_from_its_packed_export(run, data, tmp_path, capsys):
    """The same text from both, the same again for the same seed; a batch's records are those of prompts alone."""
    assert main(["export", "packed", str(run), str(tmp_path / "packed")]) == 0
    capsys.readouterr()
    texts = []
    for model in (run, run, tmp_path / "packed"):
        assert main(["generate", str(model), "--prompt", "def f", "--max-tokens", "12", "--temperature", "1.2"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1 and texts[0].startswith("def f") and len(texts[0]) > 10
    (tmp_path / "prompts").write_text("def f\nfor i in x\nreturn\n")
    flags = ["--prompts", str(tmp_path / "prompts"), "--max-tokens", "12", "--temperature", "1.2"]
    answers = []
    for size in ("1", "3"):
        assert main(["generate", str(run), *flags, "--batch-size", size]) == 0
        answers.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert answers[0] == answers[1] and [a["prompt"] for a in answers[0]] == ["def f", "for i in x", "return"]
    assert answers[0][0]["prompt"] + answers[0][0]["text"] + "\n" == texts[0]


def test_an_import_is_what_init_from_reads(ranks, tmp_path, capsys):
    """Hugging Face's model -> checkpoint -> our model: the dense model's logits."""
    from helpers.families import hf_model, our_config
    from helpers.numerics import relative_error
    from helpers.runs import batch, started_logits
    from slope_megatron.config import read_config
    from slope_megatron.config.model import ModelConfig
    from slope_megatron.training.checkpoint.init_from import check_init

    theirs = hf_model(hf_config("llama")).float()
    theirs.save_pretrained(tmp_path / "theirs")
    arguments = ["import", "hf", str(tmp_path / "theirs"), str(tmp_path / "ours")]
    assert main([*arguments, "--dry-run"]) == 0 and not (tmp_path / "ours").exists()
    assert "would be a llama model" in capsys.readouterr().out
    assert main(arguments) == 0
    command = shlex.split(capsys.readouterr().out.partition("its tokenizer: ")[2])
    started, origins = read_config(parse(command[1:]))
    assert command[:2] == ["slope", "pretrain"] and started.train.init_from == str(tmp_path / "ours")
    assert started.slope.pattern == "magnitude"
    check_init(started, 8, origins)
    model = ModelConfig(**read_yaml(tmp_path / "ours" / "model.yaml")["model"])
    found = ranks.run(started_logits, our_config(model), tmp_path / "ours", world=1)[0]
    with torch.no_grad():
        expected = theirs.double()(input_ids=batch()[0]).logits
    # The weights are equal; Hugging Face's norm computes in fp32.
    assert relative_error(found, expected) < 1e-5


def without_vocabulary(run, copy):
    """A copy of a run whose vocabulary is that of its data, which has gone but for a vocab.txt."""
    shutil.copytree(run, copy)
    (copy / "vocab.txt").write_text("[PAD]\n")
    (folder,) = (copy / "checkpoints").glob("step_*")
    edit_state(folder, model={"vocab_size": None})
    return copy


@pytest.mark.parametrize("form", ["hf", "packed"])
def test_a_link_to_an_empty_folder_is_filled_and_stays(run, tmp_path, form):
    large, link = tmp_path / "scratch" / "model", tmp_path / "home" / "model"
    large.mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(large)
    assert main(["export", form, str(run), str(link)]) == 0
    assert link.is_symlink() and (large / "config.json").is_file()
    assert [path.name for path in link.parent.iterdir()] == ["model"], "nothing is written on the small disk"
    assert [path.name for path in large.parent.iterdir()] == ["model"]


def test_an_export_again_loses_nothing(run, tmp_path, capsys):
    assert main(["export", "packed", str(run), str(tmp_path / "out")]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "exists already: nothing is replaced" in refused(capsys, "export", "packed", run, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    said = "is a link to .*gone, which does not exist"
    assert re.search(said, refused(capsys, "export", "packed", run, tmp_path / "link"))


def test_export_refuses(run, data, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").write_text("do not lose me")
    assert "exists already: nothing is replaced" in refused(capsys, "export", "hf", run, tmp_path / "there")
    assert "holds no run: give a folder" in refused(capsys, "export", "hf", tmp_path / "there", tmp_path / "out")
    assert "does not exist: give a run folder" in refused(capsys, "export", "hf", tmp_path / "no", tmp_path / "out")
    (tmp_path / "both" / "sparse" / "checkpoints").mkdir(parents=True)
    both = refused(capsys, "export", "hf", tmp_path / "both", tmp_path / "out")
    assert f"holds no run itself: give one of {tmp_path}/both/sparse" in both
    assert "has no checkpoint of step 7: it has those of 100" in refused(
        capsys, "export", "packed", run, tmp_path / "out", "--step", 7
    )
    assert "--max-shard-size is '5 apples'" in refused(
        capsys, "export", "hf", run, tmp_path / "out", "--max-shard-size", "5 apples"
    )
    assert "other/vocab.txt: a BERT vocabulary must have [UNK], [CLS], [SEP], [MASK]" in refused(
        capsys, "export", "packed", without_vocabulary(run, tmp_path / "other"), tmp_path / "out"
    )
    assert "the nearest is llama, but" in refused(capsys, "export", "hf", run, tmp_path / "out", "--family", "llama")
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    victim = next((cut / "checkpoints").glob("step_*/*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-5])
    assert f"is corrupt: its file {victim.name} has" in refused(capsys, "export", "packed", cut, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_full_disk_is_seen_before_and_a_failure_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    import collections

    from slope_megatron.export import output_folder

    usage = collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(output_folder.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
        assert "has 0.00 GB free: free some" in refused(capsys, "export", "hf", run, tmp_path / "out")
    with pytest.raises(OSError, match="broken"), output_folder.new_folder(tmp_path / "out", 10) as folder:
        (folder / "half").write_text("x")
        raise OSError("broken")
    assert not list(tmp_path.iterdir())


def test_import_refuses(tmp_path, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    assert "holds no config.json" in refused(capsys, "import", "hf", folder, tmp_path / "out")
    config = hf_config("opt")
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": "mamba"}))
    assert "is of type 'mamba'" in refused(capsys, "import", "hf", folder, tmp_path / "out")
    config.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert "pickled weights only" in refused(capsys, "import", "hf", folder, tmp_path / "out")
    (folder / "model.safetensors").write_bytes(b"\x00")
    assert "is no complete safetensors file" in refused(capsys, "import", "hf", folder, tmp_path / "out")

    import transformers

    transformers.AutoModelForCausalLM.from_config(hf_config("opt")).save_pretrained(folder)
    hf_config("opt", ffn_dim=384).save_pretrained(folder)
    said = refused(capsys, "import", "hf", folder, tmp_path / "out")
    assert "fc1.weight has the shape 192x96, and config.json asks for 36,864 elements" in said
    assert not (tmp_path / "out").exists()


def test_generate_refuses(run, data, tmp_path, capsys):
    assert "is neither a run nor a packed model" in refused(capsys, "generate", tmp_path, "--prompt", "x")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "opt"}')
    assert "is a Hugging Face model" in refused(capsys, "generate", tmp_path / "hf", "--prompt", "x")
    (tmp_path / "hf" / "config.json").write_text("{")
    damaged = refused(capsys, "generate", tmp_path / "hf", "--prompt", "x")
    assert f"{tmp_path}/hf/config.json is damaged" in damaged and "copy it again" in damaged
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    latin = refused(capsys, "generate", run, "--prompts", tmp_path / "latin")
    assert "latin is not UTF-8 (byte 3)" in latin
    assert "--device is 'gpu': it must be cpu, cuda" in refused(
        capsys, "generate", run, "--prompt", "x", "--device", "gpu"
    )
    assert "is no file: give one with a prompt" in refused(capsys, "generate", run, "--prompts", tmp_path / "no")
    assert "--temperature is -1.0" in refused(capsys, "generate", run, "--prompt", "x", "--temperature", -1)
    assert "--prompt is empty" in refused(capsys, "generate", run, "--prompt", "")
    if not torch.cuda.is_available():
        assert "has no CUDA device" in refused(capsys, "generate", run, "--prompt", "x", "--device", "cuda")


def test_another_tokenizer_is_not_the_models(run, data, tmp_path, capsys, caplog):
    """It is refused; where the model's own is gone, a larger one is, a smaller one is logged."""
    from slope_megatron.data.tokenizer import train_tokenizer
    from slope_megatron.export.trained_run import TrainedRun

    for size in (290, 310):
        (tmp_path / str(size)).mkdir()
        text = ["def f(x):\n    return x + 1\n" * 20, "for i in x: i\n", "while True: break; continue\n" * 3]
        (tmp_path / str(size) / "tokenizer.model").write_bytes(train_tokenizer(text, size))
        (tmp_path / str(size) / "manifest.json").write_text(json.dumps({"vocab_size": size}))
    packed = tmp_path / "packed"
    assert main(["export", "packed", str(run), str(packed)]) == 0
    for folder, command in ((run, "generate"), (packed, "generate"), (run, "export hf"), (run, "export packed")):
        what = [folder, "--prompt", "x"] if command == "generate" else [folder, tmp_path / "out"]
        other = refused(capsys, *command.split(), *what, "--tokenizer", tmp_path / "290")
        assert "other ids than the one that the run was trained with" in other and "leave --tokenizer out" in other

    # Where it cannot be known which one the model's was.
    (packed / "tokenizer.model").unlink()
    other = refused(capsys, "generate", packed, "--prompt", "x", "--tokenizer", tmp_path / "310")
    assert "310 has 310 tokens and the model 300 entries: it is not the model's" in other
    smaller = ["generate", str(packed), "--prompt", "x", "--tokenizer", str(tmp_path / "290"), "--max-tokens", "2"]
    assert main(smaller) == 0
    assert "has 290 tokens and the model 300 entries: is it the model's?" in caplog.text

    # Where the run's configuration leaves the vocabulary to its data.
    copy = shutil.copytree(run, tmp_path / "copy")
    (folder,) = (copy / "checkpoints").glob("step_*")
    edit_state(folder, model={"vocab_size": None}, data={"data": str(tmp_path / "own")})
    shutil.copytree(data, tmp_path / "own")
    (tmp_path / "own" / "manifest.json").write_text(json.dumps({"vocab_size": 300}))
    assert TrainedRun(copy, tokenizer=tmp_path / "290").vocabulary == 300


def test_a_text_that_the_positions_cut_short_says_so(run, caplog):
    assert main(["generate", str(run), "--prompt", "def f", "--max-tokens", "500"]) == 0
    assert "--max-tokens is 500: the text ends after" in caplog.text and "64 positions end" in caplog.text
