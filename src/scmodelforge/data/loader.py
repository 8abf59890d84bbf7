"""Batches made by threads ahead of the model, in an order that does not depend on the threads.

A batch is a pure function of (epoch, step), so the loader's whole state is these two numbers: a resumed run
asks for the batches that the interrupted one had not used yet. Threads and not processes: handing tensors
between processes costs more than making them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class BatchLoader(Generic[Batch]):
    """Iterates over one epoch of batches at a time.

    Parameters
    ----------
    make_batch
        (epoch, step) → batch; called from several threads at once.
    n_steps
        Batches an epoch.
    threads
        Threads that make batches; twice as many batches are made ahead at most.

    Attributes
    ----------
    wait_seconds
        Time spent waiting for a batch so far.
    """

    def __init__(self, make_batch: Callable[[int, int], Batch], n_steps: int, threads: int) -> None:
        self.make_batch = make_batch
        self.n_steps = n_steps
        self.threads = threads
        self.epoch = 0
        self.step = 0
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(self.threads, thread_name_prefix="batch") as pool:
            ahead: deque[Future[Batch]] = deque()
            epoch, following = self.epoch, self.step
            try:
                while self.epoch == epoch and self.n_steps:
                    while len(ahead) < 2 * self.threads and following < self.n_steps:
                        ahead.append(pool.submit(self.make_batch, epoch, following))
                        following += 1
                    started = time.perf_counter()
                    batch = ahead.popleft().result()
                    self.wait_seconds += time.perf_counter() - started
                    # The state names the next batch before this one is used, as a checkpoint needs it.
                    self.step += 1
                    if self.step == self.n_steps:
                        self.epoch, self.step = self.epoch + 1, 0
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def state_dict(self) -> dict[str, int]:
        """Epoch and step of the next batch."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken."""
        self.epoch, self.step = state["epoch"], state["step"]
