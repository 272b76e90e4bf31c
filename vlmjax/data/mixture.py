"""The order of the data: draw n of a mixture is a pure function of (seed, n).

Draws come in rounds. A round holds each source in proportion to its weight (a remainder is carried,
so that proportions are exact in the long run) in a shuffled order. A source of finite length is
read in epochs, each a new permutation; an endless one by a running number.
"""

import functools

import numpy as np


class Mixture:
    """An endless sequence of (source, record) numbers."""

    def __init__(self, lengths, weights, seed, round_size=1024):
        """Makes it.

        Args:
          lengths: number of records of each source; None = endless.
          weights: as many positive numbers.
          seed: int.
          round_size: draws in a round.
        """
        if not lengths or len(lengths) != len(weights) or min(weights) <= 0 or 0 in lengths:
            raise ValueError(
                f"a mixture needs sources with records and positive weights, got lengths {lengths} "
                f"and weights {weights}"
            )
        self.lengths, self.seed, self.round_size = list(lengths), seed, round_size
        self.weights = list(weights)
        self.shares = np.asarray(weights, np.float64) / np.sum(weights)
        self._order = functools.lru_cache(maxsize=4)(self._order)
        self._block = functools.lru_cache(maxsize=4 * len(lengths))(self._block)

    def __reduce__(self):
        return Mixture, (self.lengths, self.weights, self.seed, self.round_size)

    def _counts(self, rounds):
        """Returns i64[sources]: how often each source is drawn in the first `rounds` rounds."""
        edges = np.floor(np.cumsum(self.shares) * rounds * self.round_size + 0.5).astype(np.int64)
        return np.diff(edges, prepend=0)

    def _order(self, round_id):
        before = self._counts(round_id)
        draws = np.repeat(np.arange(len(self.lengths)), self._counts(round_id + 1) - before)
        np.random.default_rng((self.seed, round_id)).shuffle(draws)
        rank = np.zeros(len(draws), np.int64)
        for s in range(len(self.lengths)):
            rank[draws == s] = before[s] + np.arange((draws == s).sum())
        return draws, rank

    def ranks(self, start, stop):
        """Returns i64[n, 2]: (source, how often it was drawn before) of draws start to stop - 1."""
        rounds = range(start // self.round_size, -(-stop // self.round_size))
        parts = [np.stack(self._order(k), 1) for k in rounds]
        first = rounds.start * self.round_size
        return np.concatenate([*parts, np.zeros((0, 2), np.int64)])[start - first : stop - first]

    def draws(self, start, stop):
        """Returns i64[n, 2]: the (source, record) of draws start to stop - 1."""
        found = self.ranks(start, stop)
        for source in np.unique(found[:, 0]):
            at = found[:, 0] == source
            found[at, 1] = self.records(source, found[at, 1])
        return found

    def records(self, source, ranks):
        """Returns i64[n]: the records of draws of a source, a permutation in each epoch."""
        n, ranks = self.lengths[source], np.asarray(ranks, np.int64)
        if n is None:
            return ranks
        epochs, which = np.unique(ranks // n, return_inverse=True)
        seeds = [(self.seed, 1 + source, int(epoch)) for epoch in epochs]
        return permuted(ranks % n, n, seeds, which)

    def record(self, source, rank):
        """Returns the record of one draw of a source; those of a thousand are found together."""
        return int(self._block(source, rank // 1024)[rank % 1024])

    def _block(self, source, number):
        return self.records(source, np.arange(number * 1024, (number + 1) * 1024))

    def __getitem__(self, n):
        """Returns the (source, record) of draw n."""
        source, rank = map(int, self.ranks(n, n + 1)[0])
        return source, self.record(source, rank)

    def epochs(self, count):
        """Returns how many draws use every record of every finite source at least `count` times."""
        finite = [(n, share) for n, share in zip(self.lengths, self.shares, strict=True) if n]
        if not finite:
            raise ValueError("endless sources have no epochs: give the number of steps")
        rounds = 1
        wanted = np.array([0 if n is None else round(n * count) for n in self.lengths])
        rounds = max(1, int(max(n * count / share for n, share in finite) / self.round_size) - 1)
        while (self._counts(rounds) < wanted).any():
            rounds += 1
        low, high = (rounds - 1) * self.round_size, rounds * self.round_size
        drawn = self._counts(rounds - 1)
        for source in self._order(rounds - 1)[0]:
            if (drawn >= wanted).all():
                return low
            drawn[source] += 1
            low += 1
        return high


def permuted(i, n, seeds, which=0):
    """Returns i64: where permutations of range(n) send each of `i`, without ever making one.

    A Feistel network over the next power of four (as in format-preserving encryption); what falls
    outside is sent on until it falls inside.

    Args:
      i: i64 array of numbers below n.
      n: at least 1.
      seeds: tuples of ints, one for each permutation.
      which: of the permutations, for each of `i`.
    """
    if n == 1:
        return np.zeros(np.shape(i), np.int64)
    half = max((int(n - 1).bit_length() + 1) // 2, 1)
    mask = np.uint64((1 << half) - 1)
    keys = [np.random.default_rng(seed).integers(0, 1 << 62, 8, dtype=np.uint64) for seed in seeds]
    keys = np.reshape(keys, (-1, 8)).T
    x = np.asarray(i, np.uint64).copy()
    which = np.broadcast_to(which, x.shape)
    out = np.ones(x.shape, bool)
    while out.any():
        left, right, chosen = x[out] >> np.uint64(half), x[out] & mask, which[out]
        for key in keys:
            mixed = (right + key[chosen]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(64 - half))
        x[out] = left << np.uint64(half) | right
        out = x >= n
    return x.astype(np.int64)
