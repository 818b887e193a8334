"""A prepared folder that is not whole is refused before a run starts on it."""

import json
import shutil

import pytest

from slope_megatron.data.manifest import load_manifest, verify


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def test_a_whole_folder_loads(folder):
    assert load_manifest(str(folder)) == verify(folder) == json.loads((folder / "manifest.json").read_text())


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"data folder .*none does not exist: write it with `slope data prepare"):
        load_manifest(tmp_path / "none")


def test_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"data folder .*file is a file: give a folder that"):
        load_manifest(tmp_path / "file")


def test_a_file_that_may_not_be_read(folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path.name != "train.bin")
    with pytest.raises(ValueError, match=r"train.bin cannot be read \(Permission denied\): make it readable"):
        load_manifest(folder)


def test_no_manifest(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest.json: give a folder that `slope data prepare` wrote"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"format": 1'])
def test_damaged_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is damaged: delete .* and prepare the data again"):
        load_manifest(folder)


def test_another_format(folder):
    manifest = load_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match="is of format 99, this version reads 2: prepare the data again"):
        load_manifest(folder)


def test_missing_file(folder):
    (folder / "valid.idx").unlink()
    with pytest.raises(ValueError, match=r"valid.idx is missing: copy it again, or prepare the data again"):
        load_manifest(folder)


def test_cut_file(folder):
    size = (folder / "train.bin").stat().st_size
    with (folder / "train.bin").open("r+b") as file:
        file.truncate(size - 2)
    with pytest.raises(ValueError, match=f"train.bin has {size - 2} bytes, not {size}: copy it again"):
        load_manifest(folder)


def test_changed_file(folder):
    with (folder / "train.bin").open("r+b") as file:
        file.write(b"\xff")
    load_manifest(folder)
    with pytest.raises(ValueError, match=r"train.bin is not the file that was written \(it has another checksum\)"):
        verify(folder)


def test_a_manifest_that_was_changed(folder):
    """Its figures, such as a source's weight, decide what is trained on."""
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"vocab_size": 400', '"vocab_size": 401'))
    with pytest.raises(ValueError, match=r"manifest.json is not what was written \(it has another checksum\): copy it"):
        load_manifest(folder)


def test_prepared_again_over_damaged_data_says_so(folder, corpus_folder):
    from slope_megatron.data.prepare import prepare

    settings = {"vocab_size": 400, "valid_percent": 10, "test_percent": 5}
    assert prepare(str(corpus_folder), folder, **settings) == load_manifest(folder)
    with (folder / "train.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"train\.bin is not the file that was written"):
        prepare(str(corpus_folder), folder, **settings)
    prepare(str(corpus_folder), folder, overwrite=True, **settings)
    verify(folder)
