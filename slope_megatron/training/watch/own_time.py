"""The only clock of a rank that looks after others: its own.

No two clocks are ever compared. Those of hosts and file servers differ, by hours where nobody set them, and jump when
somebody does; so a heartbeat is something that changes, and how long it has not changed is measured here.
"""

import time

# In more than this, nobody could be heard: the job was suspended, or the disk stood still.
MOST_SECONDS_A_TURN = 2.0


class OwnTime:
    """Seconds during which this process could look after others; they pass from one `tick` to the next."""

    def __init__(self):
        self.seconds = 0.0
        self.last = time.monotonic()

    def tick(self) -> None:
        """A turn of the thread that looks after others."""
        now = time.monotonic()
        self.seconds += min(now - self.last, MOST_SECONDS_A_TURN)
        self.last = now
