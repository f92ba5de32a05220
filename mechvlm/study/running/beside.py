"""Work beside the model: the next batches' inputs are prepared, and the last one's rows collected.

A forward on a GPU leaves the processor free. So while one batch is read,

1. a thread opens the images of the next `AHEAD` batches and runs the processor on them;
2. another thread turns the results of the batches before into rows, and writes finished shards.

Both do what the study's own thread would do, in the same order, so that the tables are the same. An
error of theirs is raised in the study's thread when it takes what they made, or gives them more. On
the way out, whatever ends the study, no more inputs are prepared, and results that were handed over
still become rows and shards.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

I = TypeVar("I")  # noqa: E741

AHEAD = 2
"""Batches that are prepared ahead. A batch of 16 images of 336 pixels is 22 MB."""
BEHIND = 2
"""Batches whose results may wait to become rows."""


class Beside(Generic[I]):
    """Two threads beside the one that reads.

    Args:
        prepare: gives the inputs of the examples with these indices.
        batches: those that will be asked for, in order.
    """

    def __init__(self, prepare: Callable[[range], I], batches: Sequence[range]):
        self._prepare, self._left = prepare, deque(batches)
        self._coming: dict[range, Future[I]] = {}
        self._behind: deque[Future[None]] = deque()
        self._failed = False
        self._preparing = ThreadPoolExecutor(1, "mechvlm-inputs")
        self._collecting = ThreadPoolExecutor(1, "mechvlm-rows")

    def __enter__(self) -> "Beside[I]":
        self._start()
        return self

    def __exit__(self, *_) -> None:
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._collecting.shutdown()
        self._preparing.shutdown()

    def inputs(self, batch: range) -> I:
        """The inputs of a batch: those made ahead, or made now where it was not to be expected.

        Raises what `prepare` raised.
        """
        made = self._coming.pop(batch, None)
        self._start()
        return self._prepare(batch) if made is None else made.result()

    def collect(self, work: Callable[[], None]) -> None:
        """Have `work` done after all work before it, and wait where too much is left to do.

        Raises what the work before it raised. Nothing is done after work that failed.
        """
        self._wait(BEHIND - 1)
        self._behind.append(self._collecting.submit(self._do, work))

    def finish(self) -> None:
        """Wait until all work is done; raises what it raised."""
        self._wait(0)

    def _wait(self, left: int) -> None:
        while len(self._behind) > left:
            self._behind.popleft().result()

    def _do(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise

    def _start(self) -> None:
        while self._left and len(self._coming) < AHEAD:
            batch = self._left.popleft()
            self._coming[batch] = self._preparing.submit(self._prepare, batch)
