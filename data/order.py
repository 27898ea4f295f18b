"""Data order: the items of a training step are a pure function of (seed, step), so that resuming is
exact. Also evenly spaced subsets and reading ahead.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from queue import Empty, Queue
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")
BLOCK_TOKENS = 2**22  # training starts with the first block: a few seconds of tokenizing


@lru_cache(maxsize=4)  # a batch touches at most two blocks unless it is larger than one
def permutation(seed: int, epoch: int, n_items: int, block: int = 0) -> np.ndarray:
    key = (seed, epoch, block) if block else (seed, epoch)
    return np.random.default_rng(key).permutation(n_items)  # (n_items,)


def batch_indices(
    step: int, batch: int, n_items: int, seed: int, block: int | None = None
) -> list[int]:
    """Indices of the items in the batch of a step: every item once per epoch, in a new order.

    With `block`, items are permuted only within consecutive blocks of that many items.
    """
    block, indices = block or n_items, []
    for i in range(step * batch, (step + 1) * batch):
        epoch, position = divmod(i, n_items)
        start = position - position % block
        order = permutation(seed, epoch, min(block, n_items - start), start // block)
        indices.append(start + int(order[position - start]))
    return indices


def batch_epochs(step: int, batch: int, n_items: int) -> list[int]:
    """Epoch, counted from 0, of each item in the batch of a step."""
    return [i // n_items for i in range(step * batch, (step + 1) * batch)]


def evenly_spaced(n_items: int, count: int) -> list[int]:
    """At most `count` indices evenly spaced over n_items; data may be sorted, such as by class."""
    return np.linspace(0, n_items - 1, min(count, n_items)).round().astype(int).tolist()


def prefetch(read: Callable[[int], T], first: int, steps: int, device: torch.device) -> Iterator[T]:
    """Yield read(first), ..., read(steps - 1); with a GPU, read ahead in a thread."""
    items = map(read, range(first, steps))
    if device.type == "cpu":  # a thread would compete with training for the cores
        return items
    return read_ahead(items)


def read_ahead(items: Iterator[T], n_ahead: int = 1) -> Iterator[T]:
    """The items, read in a thread while earlier ones are used.

    The thread never keeps the process from ending, even while it waits for data.
    """
    queue, stopped = Queue(n_ahead), threading.Event()

    def work() -> None:
        try:
            for item in items:
                queue.put((item, None))
                if stopped.is_set():
                    return
            queue.put((None, StopIteration()))
        except BaseException as error:
            queue.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item, error = queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        with suppress(Empty):  # the thread may be waiting for a free place
            queue.get_nowait()
