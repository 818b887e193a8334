"""What is below a folder: links once, no loops, and all that is not read has a reason."""

import os
from collections import Counter

from slope_megatron.data.folder import FolderWalk
from slope_megatron.data.sources import open_source


def names_of(walk):
    return [name for name, _ in walk.files]


def test_links_are_followed_and_nothing_is_read_twice(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "b").mkdir(parents=True)
    outside.mkdir()
    (root / "b" / "own.txt").write_text("own")
    (outside / "other.txt").write_text("other")
    (outside / "back").symlink_to(root)
    # Named before what they lead to: what really lies there keeps its name all the same.
    (root / "a_folder").symlink_to(root / "b")
    (root / "a_file").symlink_to(root / "b" / "own.txt")
    (root / "c_folder").symlink_to(outside)
    (root / "d_folder").symlink_to(outside)
    (root / "e_up").symlink_to(tmp_path)
    (root / "f_ring").symlink_to(root / "g_ring")
    (root / "g_ring").symlink_to(root / "f_ring")
    (root / "h_gone").symlink_to(root / "nowhere")
    walk = FolderWalk(root)
    assert names_of(walk) == ["b/own.txt", "c_folder/other.txt"]
    assert walk.passed == Counter({"link to what is read already": 5, "broken link": 3})
    assert names_of(FolderWalk(root)) == names_of(walk)


def test_a_folder_of_links_as_in_the_hubs_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for number in range(3):
        (tmp_path / "blobs" / str(number)).write_text(f'{{"text": "{number}"}}\n')
        (snapshot / f"part{number}.jsonl").symlink_to(f"../../blobs/{number}")
    assert [text for _, text in open_source(str(snapshot)).documents()] == ["0", "1", "2"]


def test_hidden_and_left_out_things_pipes_and_closed_folders_are_counted(tmp_path, monkeypatch):
    for name in (".git", "__pycache__", "closed", "real"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    (tmp_path / ".hidden").write_text("x")
    os.mkfifo(tmp_path / "pipe")  # to read it would wait for ever
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    walk = FolderWalk(tmp_path)
    assert names_of(walk) == ["real/a.txt"]
    reasons = {"hidden": 2, "left-out folder": 1, "neither file nor folder": 1, "unreadable folder": 1}
    assert walk.passed == Counter(reasons)
