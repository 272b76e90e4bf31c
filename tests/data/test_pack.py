"""Packing: the layout of a batch, weights, resuming, determinism."""

import itertools

import jax
import numpy as np
import pytest

from vlmjax.batch import Budget, Form, TowerForm
from vlmjax.data.health import BadRecord
from vlmjax.data.mixture import Mixture
from vlmjax.data.pack import check_fits, first_fit, pack
from vlmjax.data.reader import Reader
from vlmjax.data.sample import Item, Sample, window_coords
from vlmjax.data.stream import NoGoodRecord, packed_batches

BUDGET = Budget(24, 16, 8, 4)


def make_sample(number, merge=1, grid=(2, 2), text=5, keep=None):
    count = grid[0] * grid[1] // merge**2
    keep = np.ones(count, bool) if keep is None else np.asarray(keep)
    patches = np.full((grid[0] * grid[1], 12), number % 256, np.uint8)
    visual = np.zeros(int(keep.sum()) + text, bool)
    visual[1 : 1 + int(keep.sum())] = True
    tokens = np.where(visual, 99, np.arange(len(visual))).astype(np.int32)
    labels = np.where(np.arange(len(visual)) >= len(visual) - 3, tokens, -100).astype(np.int32)
    return Sample(str(number), tokens, labels, (Item(patches, grid, merge, keep),), visual)


def test_layout_of_a_row():
    one = make_sample(7, merge=2, grid=(2, 4), keep=[False, True])
    two = make_sample(9, merge=1, grid=(1, 2))
    batch, stats = pack([[one, two]], BUDGET, Form((TowerForm(2),)))
    np.testing.assert_array_equal(batch.segments[0, :14], [1] * 6 + [2] * 7 + [0])
    np.testing.assert_array_equal(batch.positions[0, :13], [*range(6), *range(7)])
    np.testing.assert_array_equal(batch.source[0, :10], [-1, 0, -1, -1, -1, -1, -1, 1, 2, -1])
    np.testing.assert_array_equal(batch.patches[0].segments[0, :11], [1] * 8 + [2] * 2 + [0])
    np.testing.assert_array_equal(
        batch.units[0].index[0, :3], [[4, 5, 6, 7], [8, -1, -1, -1], [9, -1, -1, -1]]
    )
    np.testing.assert_array_equal(batch.patches[0].coords[0, 4:8], [[0, 2], [0, 3], [1, 2], [1, 3]])
    # labels are shifted: the loss at a slot predicts the next token, and never the first of the
    # next sample
    np.testing.assert_array_equal(np.nonzero(batch.weights[0])[0], [2, 3, 4, 9, 10, 11])
    np.testing.assert_array_equal(batch.targets[0, [2, 3, 4]], one.tokens[3:6])
    assert (stats.visual, stats.visual_before_pruning, stats.patch_pairs) == (3, 4, (64 + 4,))
    assert stats.token_pairs == 36 + 49


@pytest.mark.parametrize("how", ["token", "sample", "sqrt"])
def test_weights_sum_to_one(how):
    short, long = make_sample(1), make_sample(2)
    long.labels[1:] = long.tokens[1:]
    batch, _ = pack([[short, long], []], BUDGET, Form((TowerForm(2),)), how)
    share = batch.weights[0, :9].sum()
    n = np.array([3, 8])
    want = {"token": n / n.sum(), "sample": np.array([0.5, 0.5]), "sqrt": n**0.5 / (n**0.5).sum()}[
        how
    ]
    assert batch.weights.sum() == pytest.approx(1)
    assert share == pytest.approx(want[0])


def test_unknown_normalisation():
    with pytest.raises(ValueError, match="choose one of"):
        pack([[]], BUDGET, Form((TowerForm(2),)), "mean")


def test_window_major_order():
    np.testing.assert_array_equal(
        window_coords(2, 4, 2), [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    )


def test_first_fit_takes_the_first_row_with_room():
    assert first_fit([(n, 1, 1, 0, 0) for n in (20, 10, 4, 24)], 2, BUDGET) == [0, 1, 0, None]


def test_a_sample_that_fits_no_row_is_refused_with_the_numbers():
    with pytest.raises(
        ValueError, match=r"'3' has 20 patches \(row budget 16\), 20 visual tokens .*never cut"
    ):
        check_fits(make_sample(3, grid=(4, 5), text=4), BUDGET)


def test_placeholder_count_must_match():
    sample = make_sample(3)
    sample.visual[-1] = True
    with pytest.raises(ValueError, match="5 placeholders for 4 visual tokens"):
        check_fits(sample, BUDGET)


class Numbers:
    """Records without end."""

    def __getitem__(self, index):
        return {"id": index}


def process(record):
    rng = np.random.default_rng(record["id"])
    return make_sample(
        record["id"], grid=(1, int(rng.integers(1, 7))), text=int(rng.integers(4, 12))
    )


def stream(position=None):
    return packed_batches(
        Mixture([None], [1.0], seed=0),
        Reader(("numbers",), [Numbers()], [process]),
        [BUDGET],
        2,
        pool=12,
        form=Form((TowerForm(2),)),
        normalisation="token",
        position=position,
    )


def test_nothing_is_lost_and_nothing_comes_twice():
    ids = [int(i) for _, packed in zip(range(60), stream(), strict=False) for i in packed.ids]
    assert len(ids) == len(set(ids))
    assert set(range(max(ids) - 60)) <= set(ids)  # whatever is still waiting was drawn recently


def test_resumed_stream_equals_the_uninterrupted_one():
    whole = [p for _, p in zip(range(12), stream(), strict=False)]
    rest = [p for _, p in zip(range(5), stream(whole[6].position), strict=False)]
    for a, b in zip(whole[7:], rest, strict=True):
        assert a.ids == b.ids and a.position == b.position
        for x, y in zip(*map(jax.tree.leaves, (a.batch, b.batch)), strict=True):
            np.testing.assert_array_equal(x, y)


class Half(Numbers):
    """Two records a source, of which the odd one cannot be used."""

    def id(self, index):
        return str(index)


def half(record):
    if record["id"] % 2:
        raise BadRecord("too_long", "odd")
    return process(record)


def some(record):
    if record["id"] % 7 == 3:
        raise BadRecord("too_long", "every seventh")
    return process(record)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers):
    """With records that are asked for before the one in front of them turns out unusable."""

    def batches(position=None, **how):
        sources = dict(names=("a", "b"), sources=[Half(), Half()], processors=[some, some])
        how |= dict(pool=12, form=Form((TowerForm(2),)), normalisation="token")
        mixture = Mixture([50, 80], [2.0, 1.0], seed=0)
        return packed_batches(mixture, Reader(**sources), [BUDGET], 2, position=position, **how)

    def told(found, number):
        return [(p.ids, p.bad, p.position) for p in itertools.islice(found, number)]

    whole = told(batches(), 20)
    assert sum(len(bad) for _, bad, _ in whole) > 5
    assert told(batches(workers=workers, ahead=9), 20) == whole
    middle = whole[8][2]
    assert middle.pool and any(middle.skipped)
    assert told(batches(middle, workers=workers, ahead=9), 11) == whole[9:]


def test_bad_records_are_replaced_in_every_epoch():
    def batches(usable):
        reader = Reader(("half",), [Half()], [usable])
        how = dict(pool=4, form=Form((TowerForm(2),)), normalisation="token")
        return packed_batches(Mixture([2], [1.0], seed=0), reader, [BUDGET], 2, **how)

    found = [p for _, p in zip(range(20), batches(half), strict=False)]
    assert all(set(p.ids) == {"0"} for p in found)  # epochs without end
    assert {b.id for p in found for b in p.bad} == {"1"}

    def none(record):
        raise BadRecord("too_long", "all")

    with pytest.raises(NoGoodRecord, match="no record of source 'half' can be used; the last one"):
        next(batches(none))


def test_a_source_that_is_bad_throughout_ends_at_its_quota():
    read = []

    def none(record):
        read.append(record["id"])
        raise BadRecord("missing_file", "gone")

    reader = Reader(("half",), [Half()], [none])
    how = dict(pool=4, form=Form((TowerForm(2),)), normalisation="token", quota=0.01)
    with pytest.raises(NoGoodRecord) as caught:
        next(packed_batches(Mixture([1000], [1.0], seed=0), reader, [BUDGET], 2, **how))
    assert len({bad.id for bad in caught.value.bad}) == 11 and len(read) < 40
