"""What a reading met, and what became of it: the sum that must come out even."""

import collections
import dataclasses


@dataclasses.dataclass
class Tally:
    """Each file, link, left-out folder or record that is met counts once: as a document, or under the reason why not.

    Args:
        met: all of them.
        skipped: reason -> those that are no documents.
    """

    met: int = 0
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def pass_over(self, reason: str, count: int = 1) -> None:
        """Count what is met and passed over at once."""
        self.met += count
        self.skipped[reason] += count

    def check(self, documents: int) -> None:
        """What was met has become a document or been passed over; anything else is a fault of ours."""
        passed = self.skipped.total()
        assert self.met == documents + passed, f"{self.met} read, {documents} documents and {passed} passed over"
