"""A file that is a link is written where it points; half a file is never seen."""

from slope_megatron.storage import whole


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "large" / "metrics.jsonl")
    whole.write_text(tmp_path / "metrics.jsonl", "Zürich\n")
    assert (tmp_path / "metrics.jsonl").is_symlink()
    assert (tmp_path / "large" / "metrics.jsonl").read_bytes() == "Zürich\n".encode()
    assert [path.name for path in (tmp_path / "large").iterdir()] == ["metrics.jsonl"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    import pytest

    whole.write_text(tmp_path / "summary.json", "old")
    monkeypatch.setattr(whole.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        whole.write_text(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"
