"""Bucket shapes: which budget a batch is packed for; nothing is lost, late or packed twice."""

import functools
import itertools
from collections import Counter

import jax
import numpy as np
import pytest

from vlmjax.batch import Budget, Form, TowerForm
from vlmjax.data.mixture import Mixture
from vlmjax.data.pack import check_fits
from vlmjax.data.reader import Reader
from vlmjax.data.sample import Item, Sample
from vlmjax.data.stream import choose_bucket, packed_batches

MIXED, TEXT = Budget(64, 48, 48, 4), Budget(64, 0, 0, 4)
ROWS, POOL, DIM = 4, 24, 3


def make_sample(name, text, patches=0):
    """A sample of `text` tokens and one image of `patches` patches, each a visual token."""
    visual = np.arange(text + patches) < patches
    tokens = np.arange(len(visual), dtype=np.int32)
    item = Item(np.zeros((patches, DIM), np.uint8), (1, patches), 1, np.ones(patches, bool))
    return Sample(name, tokens, tokens, (item,) * bool(patches), visual)


class Records:
    """As many records as told, each of a length of its own: with an image, or text only."""

    def __init__(self, kind, num):
        self.kind, self.num = kind, num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return {"id": f"{self.kind}{index}"}


SOURCES = [Records("image", 300), Records("text", 100)]
MIXTURE = Mixture([300, 100], [3.0, 1.0], seed=3, round_size=64)


def process(record):
    name = record["id"]
    draw = np.random.default_rng([ord(x) for x in name]).integers
    if name.startswith("text"):
        return make_sample(name, int(draw(8, 48)))
    return make_sample(name, int(draw(3, 9)), int(draw(4, 40)))


def stream(budgets=(MIXED, TEXT), position=None, pool=POOL):
    kwargs = dict(pool=pool, form=Form((TowerForm(1),)), normalisation="token", position=position)
    reader = Reader(("image", "text"), SOURCES, [process] * 2)
    return packed_batches(MIXTURE, reader, budgets, ROWS, **kwargs)


def name(draw):
    source, record = MIXTURE[draw]
    return SOURCES[source][record]["id"]


@functools.cache
def steps(*budgets):
    return list(itertools.islice(stream(budgets), 400))


def test_every_sample_once_an_epoch_and_in_its_share():
    batches = steps(MIXED, TEXT)
    used = Counter(i for batch in batches for i in batch.ids)
    following, waiting, _ = batches[-1].position
    drawn = [name(n) for n in range(following)]
    assert used + Counter(name(n) for n, _, _ in waiting) == Counter(drawn)
    for kind, num in (("image", 300), ("text", 100)):
        times = [count for name, count in Counter(drawn).items() if name.startswith(kind)]
        assert len(times) == num and max(times) <= min(times) + 1
    texts = sum(name.startswith("text") for name in drawn)  # more of what waits is text
    assert texts / len(drawn) == pytest.approx(0.25, abs=0.01)


def test_nothing_waits_for_ever():
    oldest = [batch.position.next - min(batch.position.pool)[0] for batch in steps(MIXED, TEXT)]
    assert max(oldest) < 5 * 8 * POOL


def mean(batches, name):
    return np.mean([getattr(batch.stats, name) for batch in batches])


def test_fill_of_each_bucket():
    """Both are full; without the second a quarter of text leaves a quarter of the patches empty."""
    mixed, text = ([b for b in steps(MIXED, TEXT) if b.bucket == k] for k in range(2))
    assert len(text) > 40
    assert {b.batch.patches[0].pixels.shape for b in text} == {(ROWS, 0, DIM)}
    assert mean(text, "token_fill") > 0.94
    assert mean(mixed, "patch_fill") > 0.94
    assert mean(steps(MIXED), "patch_fill") < 0.75


def test_bucket_is_the_one_whose_slots_are_best_used():
    image, text = (48, 40, 40, 0, 0), (60, 0, 0, 0, 0)
    both = MIXED, TEXT
    assert choose_bucket([image, text], both, 2) == (0, [0, 1])  # text takes what is free
    assert choose_bucket([image, text, text], both, 2) == (1, [None, 0, 1])
    assert choose_bucket([image, text, text], both, 2, urgent=True) == (0, [0, 1, None])
    assert choose_bucket([text, image, text], both, 2, urgent=True)[0] == 1
    assert choose_bucket([image, image], (MIXED, MIXED), 2)[0] == 0  # the first of equals


def test_resumed_stream_equals_the_uninterrupted_one():
    whole = steps(MIXED, TEXT)[:40]
    assert {0, 1} == {b.bucket for b in whole[30:]}
    for a, b in zip(whole[30:], stream(position=whole[29].position), strict=False):
        assert (a.ids, a.bucket, a.position) == (b.ids, b.bucket, b.position)
        for x, y in zip(*map(jax.tree.leaves, (a.batch, b.batch)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_sample_has_to_fit_one_bucket():
    wide = Budget(52, 64, 64, 4)
    assert check_fits(make_sample("a", 0, 50), MIXED, wide) == (50, 50, 50, 0, 0)
    with pytest.raises(
        ValueError,
        match=r"'b' has 49 patches \(row budget 48\), 49 visual tokens \(row budget 48\); "
        r"53 tokens \(row budget 52\): it fits no row",
    ):
        check_fits(make_sample("b", 4, 49), MIXED, wide)


def test_short_samples_fill_a_batch_although_the_pool_is_small():
    found = next(stream(budgets=(MIXED,), pool=2))
    assert found.stats.token_fill > 0.8
