"""The training stream: (seed, n) -> record, records -> packed batches; resumes exactly."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from vlmjax.batch import Batch
from vlmjax.data.pack import Stats, check_fits, first_fit, fits, pack
from vlmjax.data.sample import Sample


class Mixture:
    """An endless stream: position n of it is a pure function of (seed, n).

    Draws come in rounds of `round_size`. A round holds each source in proportion to its weight (a
    remainder is carried, so that proportions are exact in the long run) in a shuffled order. A
    source of finite length is read in epochs, each a new permutation; one without `len` is read by
    a running number.
    """

    def __init__(self, sources, weights, seed, round_size=1024):
        """Makes the stream.

        Args:
          sources: random-access sequences of records.
          weights: as many positive numbers.
          seed: int.
          round_size: draws in a round.
        """
        if not sources or len(sources) != len(weights) or min(weights) <= 0:
            raise ValueError(
                f"a mixture needs sources with positive weights, got {len(sources)} sources "
                f"and weights {weights}"
            )
        self.sources, self.seed, self.round_size = list(sources), seed, round_size
        self.shares = np.asarray(weights, np.float64) / np.sum(weights)
        self._order = functools.lru_cache(maxsize=4)(self._order)
        self._permutation = functools.lru_cache(maxsize=4 * len(sources))(self._permutation)

    def _counts(self, rounds):
        """Returns i64[sources]: how often each source is drawn in the first `rounds` rounds."""
        edges = np.floor(np.cumsum(self.shares) * rounds * self.round_size + 0.5).astype(np.int64)
        return np.diff(edges, prepend=0)

    def _order(self, round_id):
        before = self._counts(round_id)
        draws = np.repeat(np.arange(len(self.sources)), self._counts(round_id + 1) - before)
        np.random.default_rng((self.seed, round_id)).shuffle(draws)
        rank = np.zeros(len(draws), np.int64)
        for s in range(len(self.sources)):
            rank[draws == s] = before[s] + np.arange((draws == s).sum())
        return draws, rank

    def _permutation(self, source_id, epoch):
        rng = np.random.default_rng((self.seed, 1 + source_id, epoch))
        return rng.permutation(len(self.sources[source_id]))

    def __getitem__(self, n):
        draws, rank = self._order(n // self.round_size)
        s, k = int(draws[n % self.round_size]), int(rank[n % self.round_size])
        source = self.sources[s]
        if not hasattr(source, "__len__"):
            return source[k]
        return source[int(self._permutation(s, k // len(source))[k % len(source)])]


class Position(NamedTuple):
    """Where a stream stands after a step: the next draw, and the draws waiting in the pool."""

    next: int = 0
    pool: tuple = ()


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """A `Batch`, its bucket, the record ids in it, its counts, and the stream's position after."""

    batch: Batch
    bucket: int
    ids: tuple
    stats: Stats
    position: Position


class Waiting(NamedTuple):
    """A sample in the pool."""

    draw: int
    sample: Sample
    sizes: tuple  # of `pack.size`
    rank: tuple  # the lowest is packed first


def choose_bucket(sizes, budgets, rows, urgent=False):
    """Returns (bucket, row of each sample or None): the budget that a whole batch is packed for.

    Every bucket is tried: the samples go, in the order given, each to its first row with room.
    The bucket whose slots are best used wins, the earlier of equals. A slot costs the same whether
    it is used or not, and all token slots of the largest budget as much as all its patch slots.
    So a text-only batch is made when enough text waits to fill it better than a mixed batch would
    be filled; until then text takes what images leave free.

    Args:
      sizes: of the waiting samples, of `pack.size`.
      budgets: of the buckets.
      rows: B.
      urgent: only buckets that take the first sample count.
    """
    # Of the slots that cost: tokens, and the patches of each encoder.
    costly = slice(0, 1 + len(budgets[0].patches))
    most = np.maximum(np.max([budget.limits[costly] for budget in budgets], 0), 1)

    def used(option):
        bucket, places = option
        taken = [size for size, row in zip(sizes, places, strict=True) if row is not None]
        work = sum((np.asarray(sizes[costly]) / most).sum() for sizes in taken)
        return work / (np.asarray(budgets[bucket].limits[costly]) / most).sum()

    options = [(bucket, first_fit(sizes, rows, budget)) for bucket, budget in enumerate(budgets)]
    return max((o for o in options if o[1][0] is not None or not urgent), key=used)


def packed_batches(stream, process, budgets, rows, *, pool, form, normalisation, position=None):
    """Yields `PackedBatch` without end.

    The pool holds `pool` samples; with several buckets it may hold up to eight times as many when
    the rest has no media, which takes hardly any memory, since a text-only batch needs many. Every
    step chooses a bucket (`choose_bucket`) and fills its rows from the pool: first what has waited
    too long, so nothing starves; then what fits fewer buckets than the others; then the largest.
    Nothing is lost: what does not fit waits. All of it is a function of the pool, so a `Position`
    resumes it exactly.

    Args:
      stream: draw number -> record.
      process: record -> Sample.
      budgets: a `Budget` for each bucket; a sample has to fit at least one of them.
      rows: B.
      pool: samples to look ahead, at least what a batch holds.
      form: the `Form` of the model's batches.
      normalisation: see `pack`.
      position: `Position` to resume from.
    """
    largest = np.maximum(np.max([budget.limits for budget in budgets], 0), 1)
    reach = pool if len(budgets) == 1 else 8 * pool

    def load(n):
        record = stream[n]
        try:
            sample = process(record)
            sizes = check_fits(sample, *budgets)
        except (ValueError, OSError) as e:
            raise ValueError(f"record {record.get('id')!r} (draw {n} of the stream): {e}") from e
        choices = sum(fits(sizes, budget) for budget in budgets)
        share = float(np.max(sizes / largest))
        return Waiting(n, sample, sizes, (choices, -share, n))

    position = position or Position()
    following, waiting = position.next, [load(n) for n in position.pool]
    while True:
        while len(waiting) < reach and sum(w.sizes[1] > 0 for w in waiting) < pool:
            waiting.append(load(following))
            following += 1
        late = following - 4 * reach
        waiting.sort(key=lambda w: (w.draw >= late, w.rank))
        sizes = [w.sizes for w in waiting]
        bucket, places = choose_bucket(sizes, budgets, rows, urgent=waiting[0].draw < late)
        chosen, left = [[] for _ in range(rows)], []
        for w, row in zip(waiting, places, strict=True):
            if row is None:
                left.append(w)
            else:
                chosen[row].append(w.sample)
        waiting = left
        batch, stats = pack(chosen, budgets[bucket], form, normalisation)
        ids = tuple(s.id for row in chosen for s in row)
        position = Position(following, tuple(w.draw for w in waiting))
        yield PackedBatch(batch, bucket, ids, stats, position)
