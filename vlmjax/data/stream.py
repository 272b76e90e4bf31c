"""The training stream: what a mixture draws, read and packed into batches; resumes exactly.

`packed_batches` packs whatever comes, as endless sources need; `planned_batches` loads the rows of
a plan, which needs lengths and gives fuller rows, local ones to each host, by worker processes.
"""

import collections
import contextlib
import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

from vlmjax.batch import Batch
from vlmjax.data.health import BadRecord
from vlmjax.data.loading import load
from vlmjax.data.pack import Stats, check_fits, first_fit, fits, pack
from vlmjax.data.reader import Bad, PlannedRows, join_rows, repairs_of
from vlmjax.data.sample import Sample

PLENTY = 1.25  # of what a batch takes has to wait, in one dimension, before rows are filled


class Position(NamedTuple):
    """Where a stream stands after a step.

    Attributes:
      next: the next draw.
      pool: (draw, source, rank) of what waits; the rank is that of the record read for it.
      skipped: for each source the records that could not be used, which later draws make up for.
    """

    next: int = 0
    pool: tuple = ()
    skipped: tuple = ()


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """A `Batch`, its bucket, the record ids in it, its counts, and where the data stand after it.

    `position` is a `Position`, or the `Mark` of a plan. `bad` are the records that were to be in it
    and cannot be used, `repairs` counts what was changed in those that are. All of a planned batch
    is of this host's rows only.
    """

    batch: Batch
    bucket: int
    ids: tuple
    stats: Stats
    position: tuple
    bad: tuple = ()
    repairs: dict = dataclasses.field(default_factory=dict)


class Waiting(NamedTuple):
    """A sample in the pool."""

    draw: int
    source: int
    rank: int
    sample: Sample
    sizes: tuple  # of `pack.size`
    order: tuple  # the lowest is packed first


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


class NoGoodRecord(ValueError):
    """So many records of a source in a row cannot be used that no good one is looked for.

    Attributes:
      bad: the `Bad` records since the last batch.
    """

    def __init__(self, bad):
        super().__init__(
            f"no record of source {bad[-1].source!r} can be used; the last one: {bad[-1].message}"
        )
        self.bad = bad


class ReadSamples:
    """rows[source, rank] -> (Sample, its sizes), or `Bad`; picklable, for `loading.load`."""

    def __init__(self, mixture, reader, budgets):
        self.mixture, self.reader, self.budgets = mixture, reader, budgets

    def __getitem__(self, key):
        source, rank = key
        record = self.mixture.record(source, rank)
        try:
            sample = self.reader(source, record)
            return sample, check_fits(sample, *self.budgets)
        except BadRecord as error:
            where = self.reader.names[source], self.reader.id(source, record)
            return Bad(*where, error.reason, str(error))


class Draws:
    """The samples of a mixture's draws, read ahead; iterating gives `Waiting` without end.

    First come those that wait in the pool of a position, then its next draws. A record that cannot
    be used gives way to the next of its source, whose later draws all move up; what was asked for
    before that was known is read again.

    Attributes:
      following: the next draw.
      skipped: for each source the records that could not be used so far.
    """

    def __init__(self, mixture, reader, budgets, position, quota, **how):
        self.rows, self.quota = ReadSamples(mixture, reader, budgets), quota
        self.largest = np.maximum(np.max([budget.limits for budget in budgets], 0), 1)
        self.pool, self.following = position.pool, position.next
        self.skipped = list(position.skipped or [0] * len(mixture.lengths))
        self.bad, self.asked = [], collections.deque()
        self.made = load(self.rows, keys=self._keys(self.following), **how)

    def _keys(self, following):
        for _, source, rank in self.pool:
            self.asked.append((source, rank))
            yield source, rank
        for draw in itertools.count(following):
            source, rank = map(int, self.rows.mixture.ranks(draw, draw + 1)[0])
            self.asked.append((source, rank + self.skipped[source]))
            yield self.asked[-1]

    def waiting(self):
        """Returns the `Waiting` of the pool; one that has become unusable is left out."""
        found = ((entry, self._next(entry[1:])) for entry in self.pool)
        return [self._waiting(*entry, made) for entry, made in found if made is not None]

    def take(self):
        """Returns the `Waiting` of the next draw, or raises `NoGoodRecord`.

        It is looked for until more are bad than the quota allows; where it allows any number, until
        the end of the next epoch, by when each record has come.
        """
        draw, mixture = self.following, self.rows.mixture
        source, rank = map(int, mixture.ranks(draw, draw + 1)[0])
        rank, self.following, tried = rank + self.skipped[source], draw + 1, set()
        made, length = self._next((source, rank)), mixture.lengths[source] or np.inf
        last = rank + 2 * length
        while made is None:
            tried.add(self.bad[-1].id)
            rank += 1
            if rank == last or len(tried) > max(self.quota * length, 1):
                raise NoGoodRecord(self.pop_bad())
            self.skipped[source] += 1
            made = self._usable(source, rank)
        return self._waiting(draw, source, rank, made)

    def _next(self, wanted):
        made = next(self.made)
        return self._usable(*wanted, made if self.asked.popleft() == wanted else None)

    def _usable(self, source, rank, made=None):
        """Returns (Sample, its sizes), or None for a record that is listed as unusable."""
        made = self.rows[source, rank] if made is None else made
        if not isinstance(made, Bad):
            return made
        self.bad.append(made)
        return None

    def _waiting(self, draw, source, rank, made):
        sample, sizes = made
        choices = sum(fits(sizes, budget) for budget in self.rows.budgets)
        share = float(np.max(sizes / self.largest))
        return Waiting(draw, source, rank, sample, sizes, (choices, -share, draw))

    def pop_bad(self):
        """Returns the `Bad` records found since the last call."""
        bad, self.bad = tuple(self.bad), []
        return bad


def packed_batches(
    mixture,
    reader,
    budgets,
    rows,
    *,
    pool,
    form,
    normalisation,
    position=None,
    quota=1.0,
    **how,
):
    """Yields `PackedBatch` without end.

    The pool holds `pool` samples, or more where these are too short to fill a batch; with several
    buckets it may hold up to eight times as many when the rest has no media, which takes hardly any
    memory, since a text-only batch needs many. Every
    step chooses a bucket (`choose_bucket`) and fills its rows from the pool: first what has waited
    too long, so nothing starves; then what fits fewer buckets than the others; then the largest.
    Nothing is lost: what does not fit waits. All of it is a function of the pool, so a `Position`
    resumes it exactly.

    Args:
      mixture: a `Mixture`.
      reader: (source, record) -> Sample, a `Reader`.
      budgets: a `Budget` for each bucket; a sample has to fit at least one of them.
      rows: B.
      pool: samples to look ahead.
      form: the `Form` of the model's batches.
      normalisation: see `pack`.
      position: `Position` to resume from.
      quota: share of a source's records that may be unusable. Such a record is replaced by the next
        of its source, whose later draws all move up: every other comes once an epoch as before.
      how: `workers`, `ahead` (samples) and `stall` of `loading.load`.
    """
    reach = pool if len(budgets) == 1 else 8 * pool
    largest = np.max([budget.limits for budget in budgets], 0)
    plenty = np.where(largest > 0, np.ceil(PLENTY * rows * largest), np.inf)
    draws = Draws(mixture, reader, budgets, position or Position(), quota, **how)
    with contextlib.closing(draws.made):
        waiting = draws.waiting()
        while True:
            filled = sum((w.sizes for w in waiting), np.zeros(len(largest), np.int64))
            media = sum(w.sizes[1] > 0 for w in waiting)
            while (len(waiting) < reach and media < pool) or (filled < plenty).all():
                waiting.append(draws.take())
                filled = filled + waiting[-1].sizes
                media += waiting[-1].sizes[1] > 0
            late = draws.following - 4 * max(reach, len(waiting))
            waiting.sort(key=lambda w: (w.draw >= late, w.order))
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
            pooled = tuple((w.draw, w.source, w.rank) for w in waiting)
            position = Position(draws.following, pooled, tuple(draws.skipped))
            repairs = repairs_of(s for row in chosen for s in row)
            yield PackedBatch(batch, bucket, ids, stats, position, draws.pop_bad(), repairs)


def planned_batches(plan, reader, budgets, local, *, form, normalisation, start=0, **how):
    """Yields the `PackedBatch` of each step of a plan from `start` on, of one host's rows.

    The weights are not normalised, since no host has all of them. A record that cannot be used
    leaves its slots empty: what was planned for other rows stays as it is.

    Args:
      plan: a `Plan`.
      reader: a `Reader`.
      budgets: of the buckets.
      local: numbers of the rows of a step that are wanted.
      form, normalisation: see `pack_rows`.
      start: step to begin with.
      how: `workers`, `ahead` (rows) and `stall` of `loading.load`.
    """
    rows = PlannedRows(plan, reader, budgets, form, normalisation, local)
    packed = load(rows, start * len(local), **how)
    try:
        while True:
            parts = list(itertools.islice(packed, len(local)))
            if not parts:
                return
            ids, bad = (sum((getattr(p, name) for p in parts), ()) for name in ("ids", "bad"))
            batch, stats = join_rows(parts)
            yield PackedBatch(
                batch, parts[0].bucket, ids, stats, parts[0].mark, bad, repairs_of(parts)
            )
    finally:
        packed.close()
