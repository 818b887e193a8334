"""What is below a folder: links once, no loops, and all that is not read has a reason."""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections import Counter

from slope_megatron.data.folder import FolderScan
from slope_megatron.data.settings import PrepareSettings
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
    walk = FolderScan(root)
    assert names_of(walk) == ["b/own.txt", "c_folder/other.txt"]
    assert walk.passed == Counter({"link to what is read already": 5, "broken link": 3})
    assert names_of(FolderScan(root)) == names_of(walk)


def test_a_folder_of_links_as_in_the_hubs_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for number in range(3):
        (tmp_path / "blobs" / str(number)).write_text(f'{{"text": "{number}"}}\n')
        (snapshot / f"part{number}.jsonl").symlink_to(f"../../blobs/{number}")
    assert [text for _, text in open_source(str(snapshot), PrepareSettings()).documents()] == ["0", "1", "2"]


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
    walk = FolderScan(tmp_path)
    assert names_of(walk) == ["real/a.txt"]
    reasons = {"hidden": 2, "left-out folder": 1, "neither file nor folder": 1, "unreadable folder": 1}
    assert walk.passed == Counter(reasons)


WALK_AS_NOBODY = """
import json, os, pathlib, tempfile
import slope_megatron.data.folder
if os.geteuid() == 0:
    os.setuid(65534)
with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    for name in ("listed", "open"):
        (root / name).mkdir()
        (root / name / "a.txt").write_text("text")
    (root / "link").symlink_to(root / "listed")
    (root / "listed").chmod(0o444)
    walk = slope_megatron.data.folder.FolderScan(root)
    (root / "listed").chmod(0o755)
print(json.dumps([[name for name, _ in walk.files], walk.passed]))
"""


def test_a_folder_that_names_its_files_and_opens_none_is_unreadable():
    """Mode 0444, by a user who is not root: root enters every folder."""
    done = subprocess.run([sys.executable, "-c", WALK_AS_NOBODY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["open/a.txt"], {"unreadable folder": 1, "link to what is read already": 1}]


class Name(str):
    """Counts comparisons, of longer names made of it too."""

    compared = 0

    def __lt__(self, other):
        Name.compared += 1
        return str.__lt__(self, other)

    def __radd__(self, before):
        return Name(before + str(self))


class Entry:
    def __init__(self, entry):
        self.name, self.is_symlink, self.is_dir = Name(entry.name), entry.is_symlink, entry.is_dir


def test_links_are_put_in_order_once_and_not_before_each(tmp_path, monkeypatch):
    """The hub's cache has folders of 100,000 links. For N of them a heap compares at most 2 log N times a link."""
    blobs, links, count = tmp_path / "blobs", tmp_path / "links", 256
    blobs.mkdir()
    links.mkdir()
    for number in range(count):
        (blobs / str(number)).write_text("x")
        (links / f"{number:03}").symlink_to(blobs / str(number))
    scandir = os.scandir

    @contextlib.contextmanager
    def counted(path):
        with scandir(path) as scan:
            yield map(Entry, scan)

    monkeypatch.setattr(os, "scandir", counted)
    monkeypatch.setattr(Name, "compared", 0)
    assert names_of(FolderScan(links)) == [f"{number:03}" for number in range(count)]
    # A push and a pop, and the files' own sort: log N each.
    assert 0 < Name.compared <= 4 * count * math.log2(count)
