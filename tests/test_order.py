import threading

import pytest
import torch

from data.order import batch_epochs, batch_indices, evenly_spaced, prefetch, read_ahead


def order(seed: int, n_steps: int = 5) -> list[int]:
    """Indices of the first steps with batches of 4 out of 10 items."""
    return [i for step in range(n_steps) for i in batch_indices(step, 4, 10, seed)]


@pytest.mark.parametrize("epoch", [0, 1])
def test_every_item_occurs_once_per_epoch(epoch):
    assert sorted(order(seed=0)[10 * epoch : 10 * (epoch + 1)]) == list(range(10))


def test_epochs_have_different_orders():
    assert order(seed=0)[:10] != order(seed=0)[10:]


def test_order_depends_on_the_seed():
    assert order(seed=0) != order(seed=1)


def test_order_of_a_step_does_not_depend_on_earlier_calls():
    expected = order(seed=3)[16:20]
    order(seed=4)
    assert batch_indices(4, 4, 10, seed=3) == expected


# ---- blocks
def epoch_order(n_items: int, block: int | None, epoch: int = 0, seed: int = 0) -> list[int]:
    """The order of the items in an epoch."""
    return batch_indices(epoch, n_items, n_items, seed, block)


@pytest.mark.parametrize("epoch", [0, 1])
def test_items_stay_in_their_block_and_blocks_come_in_order(epoch):
    order = epoch_order(25, 10, epoch)
    blocks = [sorted(order[i : i + 10]) for i in range(0, 25, 10)]
    assert blocks == [list(range(10)), list(range(10, 20)), list(range(20, 25))]


def test_blocks_and_epochs_have_different_orders():
    order, later = epoch_order(30, 10), epoch_order(30, 10, epoch=1)
    offsets = [tuple(i % 10 for i in part) for part in (order[:10], order[10:20], order[20:])]
    offsets += [tuple(i % 10 for i in part) for part in (later[:10], later[10:20], later[20:])]
    assert len(set(offsets)) == 6


@pytest.mark.parametrize("block", [10, 11, 1000])
def test_the_order_of_one_block_is_that_without_blocks(block):
    expected = [batch_indices(step, 4, 10, seed=5) for step in range(9)]
    assert [batch_indices(step, 4, 10, seed=5, block=block) for step in range(9)] == expected


def test_a_block_has_the_same_order_whatever_follows_it():
    assert epoch_order(20, 10) == epoch_order(57, 10)[:20]


def test_batch_epochs_count_passes_over_the_data():
    epochs = [epoch for step in range(5) for epoch in batch_epochs(step, 4, 10)]
    assert epochs == [0] * 10 + [1] * 10


@pytest.mark.parametrize(
    "n_items, count, expected",
    [(11, 3, [0, 5, 10]), (3, 100, [0, 1, 2]), (10, 1, [0]), (5, 0, [])],
)
def test_evenly_spaced_indices_reach_both_ends_without_repeats(n_items, count, expected):
    assert evenly_spaced(n_items, count) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_prefetch_reads_the_steps_in_order(device):
    assert list(prefetch(lambda step: step, 3, 7, torch.device(device))) == [3, 4, 5, 6]


def test_reading_ahead_passes_an_error_on_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("no more")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="no more"):
        next(ahead)


def test_reading_ahead_stops_when_nobody_reads():
    read = []
    ahead = read_ahead(map(read.append, range(1000)), n_ahead=2)
    next(ahead)
    ahead.close()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "work" in thread.name:
            thread.join()
    assert len(read) < 6
