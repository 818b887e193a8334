"""Every file below a folder, links included: one rule for links, no loops, and nothing left out uncounted.

Links are followed, to files and to folders alike, after all that really lies in the folder; what was found already, or
is a folder around the one that is read, is not entered again. (The hub's cache keeps datasets as folders of links.)
"""

import collections
import heapq
import os
from pathlib import Path

# Reasons for which something in a folder is not read; a folder counts as one.
HIDDEN, LEFT_OUT, AGAIN, BROKEN = "hidden", "left-out folder", "link to what is read already", "broken link"
NO_FILE, CLOSED = "neither file nor folder", "unreadable folder"


class FolderScan:
    """The files below a folder.

    Args:
        left_out: names of folders that are not entered.

    Attributes:
        files: relative name and path of each, sorted by name.
        passed: reason -> files, links and whole folders that are not among them.
    """

    def __init__(self, root: Path, left_out: frozenset[str] = frozenset({"__pycache__"})):
        self.root = root.resolve()
        self.left_out = left_out
        self.files: list[tuple[str, Path]] = []
        self.passed: collections.Counter = collections.Counter()
        # A heap: names in their order, also those that turn up in folders behind links.
        self.links: list[tuple[str, Path]] = []
        self.folders = [("", root, self.root)]
        self.seen = {self.root}
        met, entered = 1, 0
        while self.folders or self.links:
            if self.folders:
                entries = self._entries(self.folders.pop())
                entered += entries is not None
                met += len(entries or ())
            else:
                self._follow(*heapq.heappop(self.links))
        assert met == entered + len(self.files) + self.passed.total(), "something in the folder was not counted"
        self.files.sort()

    def _entries(self, folder: tuple[str, Path, Path]) -> list[os.DirEntry] | None:
        """Take what lies in a folder; None where it cannot be entered."""
        before, path, real = folder
        try:
            with os.scandir(path) as scan:
                entries = list(scan)
            # Names may be there to read, and nothing of what they name (mode 0444): this asks for a folder's search.
            os.stat(os.path.join(path, "."))
        except OSError:
            self.passed[CLOSED] += 1
            return None
        for entry in entries:
            name, here = before + entry.name, path / entry.name
            if entry.name.startswith("."):
                self.passed[HIDDEN] += 1
            elif entry.is_symlink():
                heapq.heappush(self.links, (name, here))
            elif entry.name in self.left_out and entry.is_dir():
                self.passed[LEFT_OUT] += 1
            else:
                self._take(name, here, real / entry.name)
        return entries

    def _follow(self, name: str, link: Path) -> None:
        try:
            real = link.resolve(strict=True)
        except (OSError, RuntimeError):  # to nowhere, or links in a ring
            self.passed[BROKEN] += 1
            return
        if self.root.is_relative_to(real):
            self.passed[AGAIN] += 1
        elif link.name in self.left_out and real.is_dir():
            self.passed[LEFT_OUT] += 1
        else:
            self._take(name, link, real)

    def _take(self, name: str, path: Path, real: Path) -> None:
        if real in self.seen:
            self.passed[AGAIN] += 1
        elif real.is_dir():
            self.folders.append((f"{name}/", path, real))
        elif real.is_file():
            self.files.append((name, path))
        else:
            self.passed[NO_FILE] += 1
        self.seen.add(real)
