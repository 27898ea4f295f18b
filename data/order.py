"""Data order: the items of a training step are a pure function of (seed, step), so that resuming is
exact. Also evenly spaced subsets and reading ahead.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


@lru_cache(maxsize=2)  # a batch touches at most two epochs unless it is larger than the data
def permutation(seed: int, epoch: int, n_items: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n_items)  # (n_items,)


def batch_indices(step: int, batch: int, n_items: int, seed: int) -> list[int]:
    """Indices of the items in the batch of a step: every item once per epoch, in a new order."""
    positions = range(step * batch, (step + 1) * batch)
    return [int(permutation(seed, i // n_items, n_items)[i % n_items]) for i in positions]


def batch_epochs(step: int, batch: int, n_items: int) -> list[int]:
    """Epoch, counted from 0, of each item in the batch of a step."""
    return [i // n_items for i in range(step * batch, (step + 1) * batch)]


def evenly_spaced(n_items: int, count: int) -> list[int]:
    """At most `count` indices evenly spaced over n_items; data may be sorted, such as by class."""
    return np.linspace(0, n_items - 1, min(count, n_items)).round().astype(int).tolist()


def prefetch(read: Callable[[int], T], first: int, steps: int, device: torch.device) -> Iterator[T]:
    """Yield read(first), ..., read(steps - 1); with a GPU, read one step ahead in a thread."""
    if device.type == "cpu":  # a thread would compete with training for the cores
        yield from map(read, range(first, steps))
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = thread.submit(read, first)
        for step in range(first, steps):
            ready = ahead.result()
            ahead = thread.submit(read, min(step + 1, steps - 1))
            yield ready
