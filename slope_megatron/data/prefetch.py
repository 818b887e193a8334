"""The batches of the next step, read by a thread while the GPU computes the present one."""

from concurrent.futures import Future, ThreadPoolExecutor

from slope_megatron.data.batches import Batch, MicroBatches


class Prefetch:
    """`MicroBatches`, one step ahead.

    What a step consists of is a function of its number alone, so reading ahead changes nothing but the time.

    Args:
        last_step: none is read ahead from here on.
        pin: into page-locked memory, from which a GPU copies without the host's waiting.
    """

    def __init__(self, batches: MicroBatches, last_step: int, *, pin: bool):
        self.batches, self.last_step, self.pin = batches, last_step, pin
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.ahead: tuple[int, Future[list[Batch]]] | None = None

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of this rank for the `step`-th update, counted from 0; raises what reading them raises."""
        number, future = self.ahead or (None, None)
        if future is None or number != step:
            future = self.thread.submit(self.read, step)
        found = future.result()
        self.ahead = (step + 1, self.thread.submit(self.read, step + 1)) if step + 1 < self.last_step else None
        return found

    def read(self, step: int) -> list[Batch]:
        found = list(self.batches.step(step))
        return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in found] if self.pin else found

    def close(self) -> None:
        """Wait for the thread; nothing more is read."""
        self.thread.shutdown(cancel_futures=True)
