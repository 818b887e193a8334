"""Checksums: taken at writing, compared at reading, whatever is wrong with a file said in words."""

import hashlib
import json
import os

import pytest

from slope_megatron.storage import sums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(bytes(range(200)))
    (tmp_path / "inner" / "b").write_bytes(bytes(sums.PIECE + 3))
    sums.write_manifest(tmp_path)
    return tmp_path


def test_a_whole_folder_has_no_damage(folder):
    assert sums.find_damage(folder) is None
    assert set(sums.read_manifest(folder)) == {"a", "inner/b"}
    sums.check_folder(folder, "copy it")


def test_every_bit_of_a_file_counts(folder):
    content = (folder / "a").read_bytes()
    for place in (0, 100, 199):
        for bit in (0, 7):
            (folder / "a").write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            assert sums.find_damage(folder) == "a has another checksum"


def test_every_bit_of_the_manifest_counts(folder):
    """Damage there is told too, though it may be a file that is blamed."""
    path = folder / sums.FOLDER
    content = path.read_bytes()
    spared = b""
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if sums.find_damage(folder) is None:
            spared += content[place : place + 1]
    assert not spared.strip(), "white space alone may change"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "a is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "a is no file"),
        (lambda path: path.write_bytes(b"x"), "a has 1 bytes instead of 200"),
        (lambda path: (path.parent / sums.FOLDER).write_text("{"), "checksums.json cannot be read"),
        (lambda path: (path.parent / sums.FOLDER).write_text('{"a": {"bytes": 200}}'), "checksums.json cannot be read"),
        (lambda path: (path.parent / sums.FOLDER).unlink(), "manifest.json is missing"),
    ],
)
def test_what_is_wrong_is_said(folder, spoil, said):
    spoil(folder / "a")
    assert sums.find_damage(folder) == said
    with pytest.raises(sums.Damaged, match=f"{folder} is corrupt: its file {said}; export it again"):
        sums.check_folder(folder, "export it again")


def test_a_disk_that_fails_is_told_like_damage(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(sums, "open", fail, raising=False)
    assert sums.find_damage(folder) == "a cannot be read (Input/output error)"


def test_manifests_of_before_are_read(folder):
    """They have SHA-256 alone."""
    content = (folder / "a").read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / sums.FOLDER).write_text(json.dumps({"a": entry}))
    assert sums.find_damage(folder) is None and sums.matches(content, entry)
    (folder / "a").write_bytes(content[::-1])
    assert sums.find_damage(folder) == "a has another checksum" and not sums.matches(content[::-1], entry)


def test_an_object_that_carries_its_own_sum():
    signed = sums.signed({"b": [1, 2.5], "a": "x"})
    assert sums.is_signed_right(json.loads(json.dumps(signed)))
    assert sums.is_signed_right({**signed, "a": "y"}) is False
    assert sums.is_signed_right({"a": "y"}) is None


def test_a_signed_object_is_what_its_reader_has():
    """Numbers sort in another order than the strings that JSON makes of them."""
    signed = sums.signed({"counts": {2: "b", 10: "a"}, "pair": (1, 2), "none": {None: 1, True: 2}})
    assert sums.is_signed_right(json.loads(json.dumps(signed))) is True
    assert sums.is_signed_right({**json.loads(json.dumps(signed)), "pair": [2, 1]}) is False


def test_what_readers_check_themselves_is_not_read_twice(folder, monkeypatch):
    entries = sums.read_manifest(folder)
    entries["a"]["parts"] = {"0": entries["a"][sums.ALGORITHM]}
    (folder / sums.FOLDER).write_text(json.dumps(entries))
    read, original = [], sums.file_sums
    monkeypatch.setattr(sums, "file_sums", lambda path, *rest: read.append(path.name) or original(path, *rest))
    sums.check_before_reading(folder, "copy it")
    assert read == ["b"]
    (folder / "a").write_bytes(b"cut")
    with pytest.raises(sums.Damaged, match="its file a has 3 bytes instead of 200; copy it"):
        sums.check_before_reading(folder, "copy it")
    (folder / sums.FOLDER).write_text("{")
    with pytest.raises(sums.Damaged, match=r"its file checksums\.json cannot be read; copy it"):
        sums.check_before_reading(folder, "copy it")
