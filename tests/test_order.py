import pytest
import torch

from data.order import batch_epochs, batch_indices, evenly_spaced, prefetch


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
