"""One moving line for whoever watches. The figures themselves: `writers`."""

import contextlib
import sys
import time

from tqdm import tqdm


class Progress:
    """One line on rank 0's terminal: step, loss, tokens/s, time left. Off a terminal none (`console.step_line`)."""

    def __init__(self, name: str, steps: int, done: int, visible: bool):
        self.drawn = visible and sys.stderr.isatty()
        self.bar = tqdm(
            total=steps,
            initial=done,
            desc=name,
            unit="step",
            disable=not self.drawn,
            mininterval=0.2,
            maxinterval=1.0,
            dynamic_ncols=True,
            miniters=1,
        )
        # tqdm reads the wall clock, which may be set while the run goes on: no line would come for as long.
        self.bar._time = time.monotonic  # type: ignore[attr-defined]
        self.bar.start_t = self.bar.last_print_t = time.monotonic()

    def step(self, loss: float, tokens_per_second: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        with contextlib.suppress(OSError):  # a launcher that is gone reads no output; the run still has to be saved
            self.bar.update()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()
