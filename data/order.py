"""Which item a training step sees: a pure function of (seed, step, rank), so that resuming is exact; and reading ahead."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


@lru_cache(maxsize=2)
def permutation(seed: int, sweep: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, sweep)).permutation(n)


def batch_indices(
    step: int, batch: int, n_items: int, seed: int, rank: int = 0, world: int = 1
) -> list[int]:
    """Which items this rank sees at a step: every item once a pass, each pass in an order of its own."""
    assert batch % world == 0, f"batch {batch} over {world} ranks"
    first = step * batch + rank * (batch // world)
    mine = range(first, first + batch // world)
    return [int(permutation(seed, i // n_items, n_items)[i % n_items]) for i in mine]


def prefetch(read: Callable[[int], T], first: int, steps: int, device: torch.device) -> Iterator[T]:
    """read(first), ..., read(steps - 1); for a GPU each is made while the one before is used."""
    if device.type == "cpu":  # a thread would fight over the cores with what uses the batch
        yield from map(read, range(first, steps))
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = thread.submit(read, first)
        for step in range(first, steps):
            ready = ahead.result()
            ahead = thread.submit(read, min(step + 1, steps - 1))
            yield ready
