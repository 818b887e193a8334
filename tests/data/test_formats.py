"""Files are read as what they are: by their suffix in any case, packed or not, one format to a folder."""

import bz2
import gzip
import json
import lzma
import random
import types

import pyarrow
import pyarrow.parquet
import pytest

from slope_megatron.data import compressed
from slope_megatron.data.formats import Layout, layout_of
from slope_megatron.data.prepare import prepare
from slope_megatron.data.settings import PrepareSettings
from slope_megatron.data.sources import open_source

TEXTS = [f"record {number}: ξ\x0cof\x85two\u2028lines\r\nand more\n" for number in range(40)]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def zstd(content):
    target = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(target, "zstd") as packed:
        packed.write(content)
    return target.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress, ".zst": zstd}


def parquet():
    target = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), target, write_page_checksum=True)
    return target.getvalue().to_pybytes()


CONTENTS = {
    "a.jsonl": LINES,
    "a.NDJSON": LINES,
    "lines.json": LINES,
    "array.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "short.Json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "marked.jsonl": b"\xef\xbb\xbf" + LINES,
    "wide.jsonl": LINES.decode().encode("utf-16"),
    "a.Parquet": parquet(),
}


def read(path, **options):
    source = open_source(str(path), PrepareSettings(**options))
    return [text for _, text in source.documents()], source


def dataset_folder(root, suffix="jsonl"):
    """As it is downloaded: data, and words about it."""
    (root / "data").mkdir(parents=True)
    for number in range(2):
        (root / "data" / f"part{number}.{suffix}").write_bytes(LINES if suffix == "jsonl" else parquet())
    (root / "README.md").write_text("# Dataset card\n" * 20)
    (root / "LICENSE").write_text("Licence text. ")
    return root


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", CONTENTS)
def test_every_form_gives_the_same_records(tmp_path, name, packing):
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACK[packing](CONTENTS[name]))
    texts, source = read(path)
    assert texts == TEXTS and source.split_by == "text"
    assert source.tally.met == len(TEXTS) and not source.skipped


def test_suffixes_tell_the_form():
    for name, layout in {
        "README": Layout("text", ""),
        "a.TXT.gz": Layout("text", ".txt", ".gz"),
        "notes.md": Layout("text", ".md"),
        "c4-train.00000-of-01024.JSON.GZ": Layout("json", ".json", ".gz"),
        "part.jsonl.zst": Layout("json", ".jsonl", ".zst"),
        "x.csv": Layout("other", ".csv"),
        "x.tar.xz": Layout("other", ".tar", ".xz"),
        "gz": Layout("text", ""),
    }.items():
        assert layout_of(name) == layout
    assert layout_of("x.csv", "text") == Layout("text", ".csv")


def test_an_object_over_several_lines_and_a_damaged_first_line(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"text": "all of it"}, indent=2))
    assert read(tmp_path / "one.json")[0] == ["all of it"]
    (tmp_path / "bad.json").write_bytes(b'{"text": \n' + LINES)
    texts, source = read(tmp_path / "bad.json", bad_records="skip")
    assert texts == TEXTS and source.skipped == {"no JSON": 1}
    (tmp_path / "cut.json").write_bytes(b"[\n" + LINES)
    with pytest.raises(ValueError, match=r"cut.json begins as a JSON array and is none"):
        read(tmp_path / "cut.json")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_mixed_folder_is_refused_unless_it_is_said_what_is_meant(tmp_path, suffix):
    kind = "json" if suffix == "jsonl" else suffix
    folder = dataset_folder(tmp_path / "ds", suffix)
    message = f"{kind}: 2, such as data/part0.{suffix}; text: 2, such as LICENSE"
    with pytest.raises(ValueError, match=rf"several formats \({message}\): say which are meant with --format"):
        read(folder)
    assert read(folder, format=kind)[0] == TEXTS * 2
    _, source = read(folder, format=kind)
    assert source.skipped == {"of another format": 2} and source.tally.met == 2 * len(TEXTS) + 2
    assert read(folder, include="data/*")[0] == TEXTS * 2
    assert len(read(folder, format="text")[0]) == 2
    (folder / "table.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"other: 1, such as table.csv"):
        read(folder, include="*.csv,LICENSE")
    assert read(folder, include="*.csv", format="text")[0] == ["a,b\n"]
    with pytest.raises(ValueError, match=r"table.csv is of no format that is read \(.csv\): give stdlib, a folder"):
        read(folder / "table.csv")


def test_a_mixed_folder_prepared(tmp_path):
    """Documents in are documents out and those passed over; the manifest's command says what was meant."""
    folder = dataset_folder(tmp_path / "ds")
    (folder / "data" / "again.jsonl").symlink_to(folder / "data" / "part0.jsonl")
    manifest = prepare(str(folder), tmp_path / "out", format="json", vocab_size=300, deduplicate=True, workers=1)
    (source,) = manifest["sources"]
    passed = {"duplicate": len(TEXTS), "link to what is read already": 1, "of another format": 2}
    assert source["corpus"]["skipped"] == passed
    assert manifest["corpus"]["documents"] == sum(split["documents"] for split in manifest["splits"].values())
    assert manifest["corpus"]["documents"] == len(TEXTS)
    assert "--format json" in manifest["command"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_byte_order_marks_go_and_line_ends_stay(tmp_path, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "a.txt").write_bytes((mark + TEXTS[0]).encode(encoding))
    (tmp_path / "b.txt").write_bytes(mark.encode(encoding))
    texts, source = read(tmp_path)
    assert texts == [TEXTS[0]] and source.skipped == {"empty": 1}
    (tmp_path / "c.txt").write_bytes("\ufeff".encode("utf-16-le") + b"\x00\xd8x")
    assert read(tmp_path)[1].skipped["binary"] == 1


@pytest.mark.parametrize("packing", [*list(PACK)[1:], "parquet"])
def test_damage_anywhere_is_one_sentence_or_harmless(tmp_path, packing):
    """A bit turned, or the end missing: what is read is what was written, or one sentence names the file."""
    chance = random.Random(0)
    name = f"a.jsonl{packing}" if packing in PACK else "a.parquet"
    # Line numbers make text that packs, and texts enough to be unpacked in several pieces.
    lines = "".join(json.dumps({"text": f"{n} {chance.random()}"}) + "\n" for n in range(3000)).encode()
    whole = PACK[packing](lines) if packing in PACK else parquet()
    path = tmp_path / name
    seen = set()
    for number in range(120):
        content = bytearray(whole)
        if number % 4:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            content = content[: chance.randrange(len(content))]
        path.write_bytes(content)
        try:
            read(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            seen.add("damaged" if "is damaged or cut" in str(error) else "record")
    assert "damaged" in seen


def test_what_cannot_be_unpacked_here_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LINES))
    monkeypatch.setattr(pyarrow, "Codec", types.SimpleNamespace(is_available=lambda _: False))
    with pytest.raises(ValueError, match=r"a.jsonl.zst is packed with zstd, which needs pyarrow with its codec: pip"):
        read(tmp_path / "a.jsonl.zst")


def test_a_file_that_breaks_off_is_no_shorter_document(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(compressed, "_open", broken)
    with pytest.raises(ValueError, match=r"a.txt cannot be read \(Input/output error\): make it readable, or fetch it"):
        read(tmp_path)
