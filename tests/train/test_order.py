"""The order of the data: whole epochs, and an exact continuation."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from genkern.train.data.order import Shuffled


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_an_epoch_has_every_index_at_most_once(items, batch_size, seed):
    order = Shuffled(items, batch_size, seed)
    batches = [order.next() for _ in range(items // min(batch_size, items))]
    seen = torch.cat(batches).tolist()
    assert order.epoch == 0
    assert len(set(seen)) == len(seen) > items - min(batch_size, items)
    assert set(seen) <= set(range(items))


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 30))
def test_goes_on_where_it_stood(items, batch_size, steps):
    order, later = Shuffled(items, batch_size, 3), Shuffled(items, batch_size, 3)
    for _ in range(steps):
        order.next()
    later.load_state_dict(order.state_dict())
    for _ in range(5):
        assert torch.equal(order.next(), later.next())


def test_epochs_and_seeds_differ():
    first, second = Shuffled(50, 50, 0), Shuffled(50, 50, 1)
    orders = [first.next(), first.next(), second.next(), second.next()]
    assert len({tuple(order.tolist()) for order in orders}) == 4
