"""The CSV file: appended to, never rewritten but where it must be; what cannot be read is named."""

import dataclasses

import pytest

from slope_megatron.study.rows import COLUMNS, Row, Rows

ROW = Row(
    name="sweep/s-dense-lr0.001-seed1",
    key="abc",
    group="sweep",
    size="s",
    method="dense",
    lr=1e-3,
    seed=1,
    outcome="done",
    val_loss=3.25,
    train_loss=None,
    tokens=128,
    steps=1,
    body_parameters=10,
    parameters=20,
    average_parameters=10.0,
    flops=1e9,
    actual_flops=5e8,
    state_bytes=100,
    seconds=2.5,
    tokens_per_second=50.0,
    bad_steps=0,
    device="NVIDIA H200, one",
    at_once=6,
    vocabulary=512,
    data="0123456789ab",
    version="0.1.0",
)


def other(key: str) -> Row:
    return dataclasses.replace(ROW, key=key, name=f"run {key}")


def test_rows_come_back(tmp_path):
    path = tmp_path / "results" / "rows.csv"
    rows = Rows.read(path)
    for key in ("abc", "def"):
        rows.append(other(key))
    again = Rows.read(path)
    assert again.rows == [other("abc"), other("def")] and again.find("def") == other("def")
    assert again.find("ghi") is None


def test_what_is_there_is_appended_to(tmp_path):
    path = tmp_path / "rows.csv"
    Rows.read(path).append(ROW)
    before, inode = path.read_bytes(), path.stat().st_ino
    Rows.read(path).append(other("def"))
    assert path.read_bytes().startswith(before) and path.stat().st_ino == inode


def test_a_line_that_was_cut_short_is_no_row(tmp_path):
    path = tmp_path / "rows.csv"
    Rows.read(path).append(ROW)
    with path.open("a") as file:
        file.write("run def,def,sweep")
    rows = Rows.read(path)
    assert rows.rows == [ROW]
    rows.append(other("ghi"))
    assert Rows.read(path).rows == [ROW, other("ghi")]


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(tmp_path):
    """An editor may have left the end out."""
    path = tmp_path / "rows.csv"
    Rows.read(path).append(ROW)
    path.write_text(path.read_text().rstrip("\n"))
    Rows.read(path).append(other("def"))
    assert Rows.read(path).rows == [ROW, other("def")]


def test_a_rewrite_keeps_what_others_wrote(tmp_path):
    """Columns of the user's, and rows that came after this file was read."""
    path = tmp_path / "rows.csv"
    Rows.read(path).append(ROW)
    header, line = path.read_text().splitlines()
    place = header.index(",version")
    path.write_text(f"note,{header[:place]}\ngood,{line.rpartition(',')[0]}\n")
    rows = Rows.read(path)
    with path.open("a") as file:
        file.write(f"later,{line.rpartition(',')[0].replace('abc', 'xyz')}\n")
    rows.append(other("def"))
    lines = path.read_text().splitlines()
    assert lines[0] == f"{header},note"
    assert [one.rpartition(",")[2] for one in lines[1:]] == ["good", "later", ""]
    assert [row.key for row in Rows.read(path).rows] == ["abc", "xyz", "def"]
    # With all columns there, a row is appended in their order.
    before = path.read_text()
    rows.append(other("ghi"))
    assert path.read_text().startswith(before) and Rows.read(path).find("ghi") == other("ghi")


def test_a_column_of_a_later_version_is_empty_in_earlier_rows(tmp_path):
    path = tmp_path / "rows.csv"
    Rows.read(path).append(ROW)
    lines = [line.split(",") for line in path.read_text().replace('"NVIDIA H200, one"', "GPU").splitlines()]
    place = COLUMNS.index("bad_steps")
    path.write_text("".join(",".join(line[:place] + line[place + 1 :]) + "\n" for line in lines))
    rows = Rows.read(path)
    assert rows.rows == [dataclasses.replace(ROW, bad_steps=None, device="GPU")]
    rows.append(other("def"))
    assert path.read_text().splitlines()[0].split(",") == COLUMNS
    assert len(Rows.read(path).rows) == 2


def test_what_is_no_file_of_rows_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is no file of rows of a study"):
        Rows.read(path)
    path.write_text("a,b")
    with pytest.raises(ValueError, match="is no file of rows of a study"):
        Rows.read(path)
    path.write_text("name,key,gr")
    Rows.read(path).append(ROW)
    assert Rows.read(path).rows == [ROW]
    path.unlink()
    Rows.read(path).append(ROW)
    path.write_text(path.read_text().replace(",128,", ",many,"))
    with pytest.raises(ValueError, match=r"rows\.csv:2: column tokens holds 'many', which is no int"):
        Rows.read(path)
