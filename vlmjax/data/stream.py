"""The training stream: (seed, n) -> record, records -> packed batches; resumes exactly."""

import dataclasses
import functools
import queue
import threading
from typing import NamedTuple

import numpy as np

from vlmjax.batch import Batch, Budget
from vlmjax.data.pack import Stats, check_fits, first_fit, pack


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
    """A `Batch` with the record ids in it, its counts, and the stream's position after it."""

    batch: Batch
    ids: tuple
    stats: Stats
    position: Position


def packed_batches(stream, process, budget, rows, *, pool, patch_dim, normalisation, position=None):
    """Yields `PackedBatch` without end.

    The pool holds `pool` samples. Every step fills its rows from it, the ones that have waited
    longest first and then the largest first, so nothing starves and nothing is lost: what does not
    fit waits.

    Args:
      stream: draw number -> record.
      process: record -> Sample.
      budget: a `Budget`.
      rows: B.
      pool: samples to look ahead, at least what a batch holds.
      patch_dim: values in a patch row.
      normalisation: see `pack`.
      position: `Position` to resume from.
    """
    budget = Budget(*budget).check()

    def load(n):
        record = stream[n]
        try:
            sample = process(record)
            return n, sample, check_fits(sample, budget)
        except (ValueError, OSError) as e:
            raise ValueError(f"record {record.get('id')!r} (draw {n} of the stream): {e}") from e

    position = position or Position()
    following, waiting = position.next, [load(n) for n in position.pool]
    while True:
        while len(waiting) < pool:
            waiting.append(load(following))
            following += 1
        late = following - 4 * pool
        waiting.sort(
            key=lambda w: (
                w[0] >= late,
                -max(n / max(b, 1) for n, b in zip(w[2], budget, strict=False)),
                w[0],
            )
        )
        places = first_fit([w[2] for w in waiting], rows, budget)
        chosen = [[] for _ in range(rows)]
        for (_, sample, _), row in zip(waiting, places, strict=True):
            if row is not None:
                chosen[row].append(sample)
        waiting = [w for w, row in zip(waiting, places, strict=True) if row is None]
        batch, stats = pack(chosen, budget, patch_dim, normalisation)
        ids = tuple(s.id for row in chosen for s in row)
        yield PackedBatch(batch, ids, stats, Position(following, tuple(w[0] for w in waiting)))


def prefetch(iterator, depth=2):
    """Yields the items of an iterator that runs `depth` ahead in a thread; errors are raised."""
    ready, stop = queue.Queue(depth), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue
        return None

    def work():
        try:
            for item in iterator:
                put((item, None))
                if stop.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as e:  # handed to the consumer, which raises it
            put((None, e))

    threading.Thread(target=work, daemon=True, name="vlmjax-data").start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
