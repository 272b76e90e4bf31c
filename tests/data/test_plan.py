"""Plans: every draw once, rows within budgets, any step by its number, even shards, buckets."""

import functools
import operator
import pickle
import time

import numpy as np
import pytest

from vlmjax.batch import Budget
from vlmjax.data.mixture import Mixture, permuted
from vlmjax.data.plan import Plan, best_fit

BUDGET = Budget(100, (80,), (40,), (4,))
TEXT = Budget(60, (0,), (0,), (4,))


def lengths(n, rng, text=0.0):
    """Returns i32[n, 5]: records with pictures, a share of them without."""
    shown = rng.random(n) >= text
    windows = rng.integers(1, 16, n) * shown
    tokens = rng.integers(2, 30, n) + windows
    none = np.zeros(n, int)
    return np.stack([tokens, 4 * windows, windows, none, none], 1).astype(np.int32)


def make(rows=4, draws=None, buckets=(BUDGET,), text=0.2, **settings):
    rng = np.random.default_rng(0)
    sizes = [lengths(500, rng, text), lengths(70, rng, text), lengths(300, rng, 1.0)]
    mixture = Mixture([len(s) for s in sizes], [2.0, 1.0, 3.0 if text else 0.1], seed=1)
    return Plan(mixture, sizes, buckets, rows, draws=draws, **settings)


def same(a, b):
    return a.bucket == b.bucket and all(map(np.array_equal, a.rows, b.rows))


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 12345])
def test_permuted_is_a_permutation(n):
    first, second = (permuted(np.arange(n), n, [(0, epoch)]) for epoch in (1, 2))
    assert sorted(first) == sorted(second) == list(range(n))
    assert n < 16 or (first != second).any()
    np.testing.assert_array_equal(first[::3], permuted(np.arange(n)[::3], n, [(0, 1)]))
    seeds, which = [(0, 2), (0, 1)], np.arange(n) % 2
    np.testing.assert_array_equal(
        permuted(np.arange(n), n, seeds, which), np.where(which, first, second)
    )


def test_many_epochs_of_a_small_source_take_no_time():
    """The order is that of one permutation after another."""
    mixture, began = Mixture([2, 1, 10_000], [0.25, 0.25, 0.5], seed=0), time.monotonic()
    drawn = mixture.draws(0, 32768)
    assert time.monotonic() - began < 5  # a permutation at a time takes 20 s or more
    records = drawn[drawn[:, 0] == 0, 1]
    orders = [permuted(np.arange(2), 2, [(0, 1, epoch)]) for epoch in (0, 1, 2, 4000)]
    for epoch, order in zip((0, 1, 2, 4000), orders, strict=True):
        np.testing.assert_array_equal(records[2 * epoch : 2 * epoch + 2], order)
    assert (drawn[drawn[:, 0] == 1, 1] == 0).all()


def test_draws_keep_the_weights_and_use_every_record_once_an_epoch():
    mixture = Mixture([1000, None, 50], [0.7, 0.2, 0.1], seed=0)
    drawn = mixture.draws(0, 50_000)
    np.testing.assert_allclose(np.bincount(drawn[:, 0]) / len(drawn), [0.7, 0.2, 0.1], atol=1e-4)
    for source, n in ((0, 1000), (2, 50)):
        records = drawn[drawn[:, 0] == source, 1]
        for epoch in range(3):
            assert sorted(records[epoch * n : (epoch + 1) * n]) == list(range(n))
    endless = drawn[drawn[:, 0] == 1, 1]
    np.testing.assert_array_equal(endless, np.arange(len(endless)))
    np.testing.assert_array_equal(mixture.draws(777, 3333), drawn[777:3333])
    assert mixture[4321] == tuple(drawn[4321])
    again = pickle.loads(pickle.dumps(mixture))
    assert again.shares.tobytes() == mixture.shares.tobytes()
    once = mixture.draws(0, mixture.epochs(1))
    assert all(len(set(once[once[:, 0] == s, 1])) == n for s, n in ((0, 1000), (2, 50)))


@pytest.mark.parametrize("balance", ["step", "none"])
@pytest.mark.parametrize("rows", [1, 4, 64, 1000])
def test_every_draw_once_and_rows_within_their_budget(rows, balance):
    plan = make(rows, draws=3000, balance=balance)
    steps = list(plan)
    assert len(plan) == len(steps) and all(len(step.rows) == rows for step in steps)
    drawn = np.concatenate([row for step in steps for row in step.rows])
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, plan.mixture.draws(0, 3000)))
    for row in (row for step in steps for row in step.rows):
        used = sum(plan.sizes[s][r] for s, r in row) if len(row) else np.zeros(5)
        assert (used <= BUDGET.limits).all()
    with pytest.raises(IndexError, match="the plan ends before"):
        plan[len(steps)]


@pytest.mark.parametrize("rows", [1, 4, 300])
def test_any_step_by_its_number(rows):
    """In any order, from a mark, in another process, and whatever the end."""
    whole = list(make(rows, draws=6000))
    plan = make(rows, draws=6000)
    for step in (len(whole) - 1, 0, len(whole) // 2, 1 % len(whole)):
        assert same(plan[step], whole[step])
        later = make(rows, draws=6000, mark=plan.mark(step))
        for k in range(step, min(step + 20, len(whole))):
            assert same(later[k], whole[k])
        with pytest.raises(IndexError, match="before the mark"):
            later[-1]
    assert same(pickle.loads(pickle.dumps(plan))[1 % len(whole)], whole[1 % len(whole)])
    endless = make(rows)
    assert same(endless[0], make(rows)[0]) and len(endless[2000 // rows].rows) == rows


def test_rows_are_full_and_shards_even():
    rng = np.random.default_rng(0)
    sizes = [lengths(20_000, rng)]
    mixture = Mixture([20_000], [1.0], seed=0)
    wide = Budget(100, (200,), (50,), (4,))  # tokens are what fills it
    even, mixed = (
        list(Plan(mixture, sizes, (wide,), 64, draws=20_000, balance=b)) for b in ("step", "none")
    )

    def loads(steps):
        rows = [[sizes[0][row[:, 1]].sum(0) for row in step.rows] for step in steps[:-1]]
        return np.array(rows, float)

    fill = loads(even).mean((0, 1)) / np.maximum(wide.limits, 1)
    assert fill.max() > 0.98

    def imbalance(steps):
        patches = loads(steps)[..., 1]
        return (patches.max(1) / patches.mean(1)).mean() - 1

    assert imbalance(even) < 0.1 < imbalance(mixed)


def test_text_that_fills_no_room_beside_pictures_gets_steps_of_its_own():
    plan = make(4, draws=4000, buckets=(BUDGET, TEXT))
    steps = list(plan)
    drawn = np.concatenate([row for step in steps for row in step.rows])
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, plan.mixture.draws(0, 4000)))
    assert {step.bucket for step in steps} == {0, 1}
    for step in steps:
        for row in step.rows:
            used = sum(plan.sizes[s][r] for s, r in row) if len(row) else np.zeros(5)
            assert (used <= (BUDGET, TEXT)[step.bucket].limits).all()
    without = make(4, draws=4000, buckets=(BUDGET, TEXT), text=0.0)
    assert sum(step.bucket for step in without) < 0.1 * len(list(without))


def test_best_fit_is_tight():
    shares = np.array([[0.6, 0.1], [0.5, 0.9], [0.4, 0.1], [0.3, 0.05], [0.1, 0.8], [0.1, 0.0]])
    rows = [set(row) for row in best_fit(shares)]
    assert len(rows) == 2 and set.union(*rows) == set(range(6))
    assert best_fit(np.zeros((0, 3))) == []


def test_rows_do_not_depend_on_how_a_library_rounds():
    """Sums in order, as in Python; here the kernels of OpenBLAS break a tie in another way."""
    rng = np.random.default_rng(109)
    dims, limits = int(rng.integers(2, 6)), np.array([13, 14, 15, 17, 19])
    shares = rng.integers(1, 5, (300, dims)) / limits[:dims]
    weights = (shares.sum(0) / shares.sum()).tolist()
    rows, taken = [], []
    for i in np.argsort(-shares.max(1), kind="stable"):
        after = [[x + y for x, y in zip(row, shares[i].tolist(), strict=True)] for row in taken]
        scores = [
            functools.reduce(operator.add, map(operator.mul, weights, row))
            if max(row) <= 1 + 1e-9
            else -1.0
            for row in after
        ]
        if max(scores, default=-1.0) < 0:
            rows.append([i])
            taken.append(shares[i].tolist())
        else:
            best = int(np.argmax(scores))
            rows[best].append(i)
            taken[best] = after[best]
    assert [row.tolist() for row in best_fit(shares)] == rows


def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match="balance='rows' is unknown; choose one of"):
        make(balance="rows")
    with pytest.raises(ValueError, match=r"bucket 1 has patches=\(80,\): a plan has one budget"):
        make(buckets=(BUDGET, BUDGET))
    with pytest.raises(TypeError, match="without end"):
        len(make())
    with pytest.raises(ValueError, match="sources with records"):
        Mixture([3, 0], [1.0, 1.0], 0)
