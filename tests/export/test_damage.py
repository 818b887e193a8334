"""A turned bit in what this program wrote is told by every command that reads it, and a planted pickle is never run."""

import json
import shutil

import pytest

from helpers.payload import plant
from helpers.runs import made_run
from slope_megatron.cli import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from slope_megatron.data.manifest import describe_files, write_manifest
    from slope_megatron.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("data")
    (folder / "tokenizer.model").write_bytes(
        train_tokenizer(["def f(x):\n    return x + 1\n" * 20, "for i in x: i\n"], 300)
    )
    write_manifest(folder, {"files": describe_files(folder), "vocab_size": 300})
    return folder


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    made_run(ranks, folder, "opt", vocab_size=300, max_position_embeddings=64, data=data)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def packed(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "packed"
    assert main(["export", "packed", str(whole), str(folder)]) == 0
    return folder


@pytest.fixture(params=["hf", "packed", "generate"])
def refuses(request, run, tmp_path, capsys):
    """Each reader of a run: `refuses(model)` is the sentence it ends with."""

    def refusal(model=run):
        if request.param == "generate":
            code = main(["generate", str(model), "--prompt", "def", "--max-tokens", "2"])
        else:
            code = main(["export", request.param, str(model), str(tmp_path / "out")])
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("slope: error: ")]
        assert code == 2 and len(said) == 1 and not (tmp_path / "out").exists()
        return said[0]

    return refusal


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def checkpoint_of(run):
    return next((run / "checkpoints").glob("step_*"))


def place_of(checkpoint, name):
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(checkpoint).read_metadata().storage_data
    info = next(info for index, info in stored.items() if index.fqn == name)
    return checkpoint / info.relative_path, info.offset + info.length // 2


def test_a_turned_bit_in_a_weight(run, refuses):
    folder = checkpoint_of(run)
    path, place = place_of(folder, "decoder.layers.1.mlp.linear_fc1.weight")
    flip(path, place)
    said = refuses()
    assert f"{folder} is corrupt: its file {path.name} has another checksum" in said
    assert said.endswith("take another checkpoint with --step")


@pytest.mark.parametrize("name", ["state.json", ".metadata", "manifest.json"])
def test_a_turned_bit_in_a_small_file(run, refuses, name):
    folder = checkpoint_of(run)
    flip(folder / name, (folder / name).stat().st_size // 2)
    assert f"{folder} is corrupt: its file " in refuses()


def test_a_checkpoint_of_before_is_read_and_checked(run, refuses, tmp_path):
    """With SHA-256 of whole files and no parts."""
    import hashlib

    folder = checkpoint_of(run)
    names = json.loads((folder / "manifest.json").read_text())
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in names
        for content in [(folder / name).read_bytes()]
    }
    (folder / "manifest.json").write_text(json.dumps(entries))
    assert main(["export", "hf", str(run), str(tmp_path / "hf")]) == 0
    path, place = place_of(folder, "decoder.layers.1.mlp.linear_fc1.weight")
    flip(path, place)
    assert f"its file {path.name} has another checksum" in refuses()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model", "checksums.json"])
def test_a_turned_bit_in_a_packed_export(packed, tmp_path, capsys, name):
    folder = shutil.copytree(packed, tmp_path / "packed")
    flip(folder / name, (folder / name).stat().st_size * 2 // 3)
    assert main(["generate", str(folder), "--prompt", "def", "--max-tokens", "2"]) == 2
    said = capsys.readouterr().err
    assert name in said and "copy it again, or export the run again" in said


def test_a_packed_export_of_before_is_read_and_the_log_says_so(packed, tmp_path, caplog):
    folder = shutil.copytree(packed, tmp_path / "packed")
    (folder / "checksums.json").unlink()
    with caplog.at_level("INFO"):
        assert main(["generate", str(folder), "--prompt", "def", "--max-tokens", "2"]) == 0
    assert f"{folder} carries no checksums: damage in it would go unnoticed" in caplog.text


def test_a_turned_bit_in_the_weights_of_an_hf_export(whole, tmp_path, capsys):
    """It can be imported again; its settings may be edited, its weights not."""
    folder = tmp_path / "hf"
    assert main(["export", "hf", str(whole), str(folder), "--adapters", "drop"]) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "edited"}))
    assert main(["import", "hf", str(folder), str(tmp_path / "ours")]) == 0
    assert {".metadata", "checksums.json"} <= {path.name for path in (tmp_path / "ours").iterdir()}
    flip(folder / "model.safetensors", -100)
    assert main(["import", "hf", str(folder), str(tmp_path / "again")]) == 2
    assert "its file model.safetensors has another checksum; export the run again" in capsys.readouterr().err


def test_a_turned_bit_in_an_imported_model(whole, tmp_path):
    """`--init-from` reads it by this."""
    from slope_megatron.models.dense_checkpoint import MegatronCheckpoint
    from slope_megatron.storage import sums

    assert main(["export", "hf", str(whole), str(tmp_path / "hf"), "--adapters", "drop"]) == 0
    assert main(["import", "hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    path, place = place_of(tmp_path / "ours", name)
    MegatronCheckpoint(tmp_path / "ours")[name]
    flip(path, place)
    with pytest.raises(sums.Damaged, match=r"is corrupt: its file .*\.distcp has another checksum in the \d+ bytes"):
        MegatronCheckpoint(tmp_path / "ours")[name]


def test_a_turned_bit_in_the_tokenizer(whole, data, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "data")
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.copyfile(copy / "manifest.json", run / "manifest.json")
    shutil.copyfile(copy / "tokenizer.model", run / "tokenizer.model")
    flip(run / "tokenizer.model", 300)
    assert main(["generate", str(run), "--prompt", "def", "--max-tokens", "2"]) == 2
    assert "tokenizer.model is not what was written (it has another checksum)" in capsys.readouterr().err


def test_a_planted_pickle_is_not_run(run, refuses, tmp_path):
    plant(checkpoint_of(run), ".metadata", tmp_path / "ran")
    said = refuses()
    assert "which may run code: nothing was executed; use a checkpoint whose origin you trust" in said
    assert not (tmp_path / "ran").exists()
