"""One global order of prompts: each once an epoch, for any number of processes, resumed or not."""

import grain
import jax
import numpy as np
import pytest
from hypothesis import example, given, strategies as some

from ddmd_jax.data import loader
from ddmd_jax.data.batch import Batch
from ddmd_jax.data.order import Order, OrderByShape
from ddmd_jax.train.feed import Feed

BUCKETS = (8, 16, 64)


def lengths_of(count, seed=0):
    return np.random.default_rng(seed).integers(1, BUCKETS[-1] + 1, count)


def make(count=50, batch=4, seed=0, **changes):
    bucketed = {'lengths': lengths_of(count), 'buckets': BUCKETS, 'window': 4}
    return Order(np.arange(count), batch, seed, **(bucketed | changes))


def read(order, batch, processes=1, process=0):
    """An iterator over the rows that a process gets which holds an equal part of a batch."""
    mine = np.arange(batch).reshape(processes, -1)[process]
    return loader.batches(order, lambda planned: planned.rows, mine)


@example(count=70, batch=12, window=9, seed=3, bucketed=True)
@given(count=some.integers(1, 24), batch=some.integers(1, 7), window=some.integers(1, 9),
       seed=some.integers(0, 3), bucketed=some.booleans())
def test_every_prompt_of_an_epoch_exactly_once(count, batch, window, seed, bucketed):
    order = make(count, batch, seed, window=window) if bucketed else (
        Order(np.arange(count), batch, seed))
    stream = np.concatenate([order[i].rows for i in range(-(-3 * count // batch))])
    for epoch in range(3):
        assert sorted(stream[epoch * count:(epoch + 1) * count]) == list(range(count))


@example(count=70, batch=12, seed=2**32 - 1)
@given(count=some.integers(1, 24), batch=some.integers(1, 7), seed=some.integers(0, 2**32 - 1))
def test_rows_are_in_the_order_of_grains_data_set(count, batch, seed):
    rows = 2 * np.arange(count) + 1
    stream = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    order = Order(rows, batch, seed)
    for i in (0, 1, 40):
        assert order[i].rows.tolist() == [stream[i * batch + k] for k in range(batch)]


@example(count=70, batch=8, start=40)
@given(count=some.integers(8, 24), batch=some.integers(1, 7), start=some.integers(0, 12))
def test_a_batch_depends_on_its_number_alone(count, batch, start):
    """Whoever goes on at batch n sees what he would have seen without a stop."""
    walked = make(count, batch)
    for i in range(start):
        walked[i]
    a, b = walked[start], make(count, batch)[start]
    np.testing.assert_array_equal(a.rows, b.rows)
    assert a.length == b.length


@example(count=70, batch=12)
@given(count=some.integers(1, 24), batch=some.integers(1, 7))
def test_a_batch_is_cut_to_the_least_bucket_that_holds_its_longest(count, batch):
    order, lengths = make(count, batch), lengths_of(count)
    for planned in (order[i] for i in range(8)):
        longest = lengths[planned.rows].max()
        assert planned.length == min(b for b in BUCKETS if b >= longest)


def test_prompts_of_like_length_go_together():
    """Uniform lengths: mixed, nearly every batch of 16 needs the longest bucket."""
    lengths, rows = lengths_of(4096), np.arange(4096)
    mean = lambda order: np.mean([order[i].length for i in range(256)])
    mixed = mean(Order(rows, 16, 0, lengths, BUCKETS, window=1))
    assert mixed > 63 and mean(Order(rows, 16, 0, lengths, BUCKETS)) < 0.85 * mixed
    order = Order(rows, 16, 0, lengths, BUCKETS)
    found = [order[i].length for i in range(64)]
    assert found != sorted(found)  # short ones do not all come first


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    order, other = make(40), make(40, seed=1)
    first, second, third = ([tuple(o[i].rows) for i in range(k, k + 10)]
                            for o, k in ((order, 0), (order, 10), (other, 0)))
    assert first != second and first != third and sorted(map(sorted, first)) != sorted(
        map(sorted, second))


def test_a_prompt_longer_than_the_last_bucket_is_refused():
    with pytest.raises(ValueError, match='longer than the last bucket, 64'):
        Order(np.arange(2), 1, 0, np.asarray([3, 65]), BUCKETS)


def test_shapes_are_drawn_for_every_batch_by_its_number():
    shapes = ((8, 8, 4), (4, 16, 4), (16, 4, 4))
    drawn, again, other = ([order[i].shape for i in range(300)] for order in (
        make(shapes=shapes), make(shapes=shapes), make(shapes=shapes, seed=1)))
    assert again == drawn != other
    assert all(80 < drawn.count(shape) < 120 for shape in shapes)


def test_kinds_are_all_there_may_be_the_first_ones_first():
    order = make(shapes=((8, 8, 4), (4, 16, 4)))
    kinds, met = order.kinds(3), [(order[i].length, order[i].shape) for i in range(3)]
    assert len(kinds) == len(set(kinds)) == 6
    assert kinds[:len(set(met))] == list(dict.fromkeys(met))
    assert Order(np.arange(4), 2, 0).kinds(3) == [(None, None)]


# --- Read by several processes ---


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_the_global_order_does_not_depend_on_the_number_of_processes(processes):
    order = make()
    parts = [read(order, 4, processes, p) for p in range(processes)]
    for i in range(30):
        np.testing.assert_array_equal(
            np.concatenate([next(part) for part in parts]), order[i].rows)


@pytest.mark.parametrize('before, after', [(4, 1), (1, 2), (2, 4)])
def test_another_number_of_processes_goes_on_where_it_was(before, after):
    """One epoch of 48 prompts: five batches by so many processes, the rest by others."""
    order, seen = make(48), []
    parts = [read(order, 4, before, p) for p in range(before)]
    for _ in range(5):
        seen += [row for part in parts for row in next(part)]
    (state,) = {str(part.get_state()) for part in parts}  # the same in all of them
    parts, state = [read(order, 4, after, p) for p in range(after)], parts[0].get_state()
    for part in parts:
        part.set_state(state)
    for _ in range(7):
        seen += [row for part in parts for row in next(part)]
    assert sorted(seen) == list(range(48))


# --- One ahead of the step ---


def test_a_feed_is_one_batch_ahead_and_its_state_is_not():
    placed = []

    def place(batch):
        placed.append(batch)
        return batch

    order = make()
    feed = Feed(read(order, 4), place)
    taken = [next(feed) for _ in range(3)]
    assert len(placed) == 4  # the fourth is on its way before anyone asks
    np.testing.assert_array_equal(taken, [order[i].rows for i in range(3)])
    again = Feed(read(order, 4), place)
    next(again)  # one is ready, and thrown away
    again.set_state(feed.get_state())
    np.testing.assert_array_equal(next(again), order[3].rows)
    np.testing.assert_array_equal(next(feed), order[3].rows)


def test_a_feed_counts_the_seconds_that_it_is_not_ready():
    class Slow:
        def __iter__(self):
            return self

        def __next__(self):
            import time
            time.sleep(0.05)
            return 0

        def get_state(self):
            return {}

    feed = Feed(Slow(), lambda batch: batch)
    next(feed)  # two are fetched; nothing can precede the first
    assert 0.04 < feed.waited < 0.09
    next(feed)
    assert feed.waited > 0.09


def test_a_batch_is_a_tree_whose_shape_is_not_traced():
    batch = Batch({'x': np.ones(2)}, shape=(8, 8, 4))
    double = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(batch)
    assert double.shape == (8, 8, 4) and double.cond['x'].tolist() == [2, 2]


# --- Latents of several shapes ---


def by_shape(count=70, batch=4, seed=0):
    shape_of = np.random.default_rng(3).choice(3, count, p=[0.7, 0.25, 0.05])
    shapes = ((8, 8, 4), (6, 10, 4), (10, 6, 4))
    return OrderByShape(np.arange(count), batch, seed, shapes, shape_of), shape_of, shapes


def test_rows_of_a_batch_have_one_shape_and_come_round_evenly():
    order, shape_of, shapes = by_shape()
    counts = np.zeros(70, int)
    for i in range(200):
        planned = order[i]
        assert {shapes[s] for s in shape_of[planned.rows]} == {planned.shape}
        assert planned.length is None and len(planned.rows) == 4
        np.add.at(counts, planned.rows, 1)  # a shape of three rows repeats one in a batch
    for i in range(3):  # of one shape every row comes as often as any other
        own = counts[shape_of == i]
        assert own.min() >= 1 and own.max() - own.min() <= 1
    assert set(order.kinds(3)) == {(None, shape) for shape in shapes}


def test_a_batch_is_known_by_its_number_alone():
    one, two = by_shape()[0], by_shape()[0]
    for i in (37, 2, 199, 2):
        np.testing.assert_array_equal(one[i].rows, two[i].rows)
    other = by_shape(seed=1)[0]
    assert any(not np.array_equal(one[i].rows, other[i].rows) for i in range(5))
