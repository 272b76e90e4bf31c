"""Which samples share which row of which step: a pure function of the lengths, made before any file
is opened.

    plan = Plan(mixture, sizes, budgets, rows=256)
    bucket, rows = plan[step]       # rows: one array [(source, record), ...] each

Draws are taken in windows. The samples of a window are packed by best fit, the largest first, on
tokens, patches and whatever else a row has slots for at once. Its rows are then dealt to steps, so
that the rows of a step hold about as many patches each: no device waits for the one with the long
video. What is left of a step at the end of a window is completed by the next. Nothing else is
carried over, so any process finds the rows of any step by itself, from the number of the step.
"""

from typing import NamedTuple

import numpy as np

BALANCE = ("step", "none")
VERSION = 3  # of the rules below: other rows for the same lengths need another number


class Step(NamedTuple):
    """The rows of a step, i64[n, 2] each: (source, record) of samples; some may be empty."""

    bucket: int
    rows: tuple


class Mark(NamedTuple):
    """Where planning can begin: a window, the step its first row belongs to, and how many rows
    of that step come from windows before it."""

    window: int = 0
    step: int = 0
    pending: int = 0


class _Window(NamedTuple):
    """The steps that a window completes, and what it leaves for the next."""

    mark: Mark
    before: Mark  # of the oldest row that it was handed
    steps: list
    begun: list  # rows of the step that the next window completes
    origin: Mark  # of the oldest of these


class Plan:
    """The steps of a run, by number."""

    def __init__(
        self, mixture, sizes, budgets, rows, *, window=32768, balance="step", draws=None, mark=None
    ):
        """Makes the plan; nothing is planned before a step is asked for.

        Args:
          mixture: a `Mixture` of the sources, or what has its `draws`.
          sizes: for each source i32[records, n], what `pack.size` counts of each record.
          budgets: of the buckets. Those behind the first hold text only: a step of one is planned
            where a window has so much text that it is better packed alone.
          rows: of a step.
          window: draws that are packed together; more where a step has many rows.
          balance: "step": the rows of a step hold about as many patches each; "none": whichever.
          draws: how many there are; None = without end. The last step may have empty rows.
          mark: a `Mark` of this plan to begin at; steps before it are not found.
        """
        if balance not in BALANCE:
            raise ValueError(f"balance={balance!r} is unknown; choose one of {BALANCE}")
        for k, budget in enumerate(budgets[1:], 1):
            if any(budget.patches):
                raise ValueError(
                    f"bucket {k} has patches={budget.patches}: a plan has one budget with "
                    "pictures, data.budget, and buckets of text; remove that bucket or data.index"
                )
        self.mixture, self.sizes, self.rows, self.balance = mixture, sizes, rows, balance
        self.limits = [np.asarray(budget.limits, np.int64) for budget in budgets]
        self.patches = slice(1, 1 + len(budgets[0].patches))
        self.total, self.first = draws, mark or Mark()
        self.window = max(window, 16 * rows)
        if any(mixture.lengths):  # no sample twice before all were seen once
            self.window = min(self.window, mixture.epochs(1))
        self._now = None

    def __getstate__(self):
        return self.__dict__ | {"_now": None}

    def __len__(self):
        """The number of steps of a plan with an end; plans all of it."""
        if self.total is None:
            raise TypeError("a plan without end has no length")
        return sum(1 for _ in self)

    def __iter__(self):
        step = self.first.step
        while (found := self._find(step)) is not None:
            yield found
            step += 1

    def __getitem__(self, step):
        """Returns the `Step`; IndexError behind the last."""
        found = self._find(step)
        if found is None:
            raise IndexError(
                f"the plan ends before step {step}: lower train.steps or raise data.epochs"
            )
        return found

    def mark(self, step):
        """Returns the `Mark` from which this step and all later ones are found."""
        self[step]
        return self._now.before if step == self._now.mark.step else self._now.mark

    def _find(self, step):
        if self._now is None or step < self._now.mark.step:
            if step < self.first.step:
                raise IndexError(f"step {step} lies before the mark {self.first}")
            self._now = self._plan(self.first, [None] * self.first.pending, self.first)
        while self._now is not None and step >= self._now.mark.step + len(self._now.steps):
            self._now = self._following(self._now)
        if self._now is None:
            return None
        return self._now.steps[step - self._now.mark.step]

    def _following(self, w):
        mark = Mark(w.mark.window + 1, w.mark.step + len(w.steps), len(w.begun))
        if self.total is not None and mark.window * self.window >= self.total:
            return None
        return self._plan(mark, w.begun, w.origin)

    def _plan(self, mark, begun, origin):
        """Returns the `_Window` of a mark; `begun` are the rows that it completes to a step."""
        start, stop = mark.window * self.window, (mark.window + 1) * self.window
        last = self.total is not None and stop >= self.total
        draws = self.mixture.draws(start, stop if self.total is None else min(stop, self.total))
        sizes = self.taken(draws)
        rng = np.random.default_rng((self.mixture.seed, 2**20, mark.window))
        rows, texts = self._pack(sizes, rng)
        if last and (short := -(len(begun) + len(rows)) % self.rows):
            rows += [np.zeros(0, np.int64)] * short
        head = min(-len(begun) % self.rows, len(rows))
        first, wholes, rest = self._deal(rows, sizes, head, rng)
        steps = [Step(0, tuple(draws[row] for row in rows)) for rows in wholes]
        steps += [Step(bucket, tuple(draws[row] for row in rows)) for bucket, rows in texts]
        steps = [steps[k] for k in rng.permutation(len(steps))]
        before, begun = origin, begun + [draws[row] for row in first]
        if len(begun) == self.rows:
            steps.insert(0, Step(0, tuple(begun)))
            begun = []
        if not begun:
            origin = mark
        return _Window(mark, before, steps, begun + [draws[row] for row in rest], origin)

    def taken(self, draws):
        """Returns i64[n, sizes]: what the sample of each (source, record) takes of a row."""
        found = np.zeros((len(draws), len(self.limits[0])), np.int64)
        for source in np.unique(draws[:, 0]):
            at = draws[:, 0] == source
            found[at] = self.sizes[source][draws[at, 1]]
        return found

    def _pack(self, sizes, rng):
        """Returns (rows of the first budget, [(bucket, rows of a step)] of text): sample numbers.

        Rows that hold nothing but text are what text fills no room beside pictures with. As many of
        them as make whole steps go to the buckets of text.
        """
        rows, steps = self._fit(np.arange(len(sizes)), sizes, 0), []
        for bucket, limits in enumerate(self.limits[1:], 1):
            texts = [row for row in rows if not sizes[row][:, self.patches].any()]
            alone = np.concatenate([*texts, np.zeros(0, np.int64)])
            short = alone[(sizes[alone] <= limits).all(1)]
            own = self._fit(short, sizes, bucket)
            own = [own[k] for k in rng.permutation(len(own))]
            own = own[: len(own) // self.rows * self.rows]
            steps += [(bucket, own[k : k + self.rows]) for k in range(0, len(own), self.rows)]
            if own:
                rows = [row for row in rows if sizes[row][:, self.patches].any()]
                rows += self._fit(np.setdiff1d(alone, np.concatenate(own)), sizes, 0)
        return rows, steps

    def _fit(self, samples, sizes, bucket):
        shares = sizes[samples] / np.maximum(self.limits[bucket], 1)
        return [samples[row] for row in best_fit(shares)]

    def _deal(self, rows, sizes, head, rng):
        """Returns (the `head` rows that complete a step, whole steps, the rows left)."""
        order = rng.permutation(len(rows))
        whole = (len(rows) - head) // self.rows * self.rows
        if self.balance == "step":
            patches = np.array([sizes[row][:, self.patches].sum() for row in rows])
            order = order[np.argsort(patches[order], kind="stable")]
        # Rows of steps that other windows have a part in are those in the middle.
        ends = len(rows) - whole
        low = (len(rows) - ends) // 2
        shared = rng.permutation(order[low : low + ends])
        order = np.concatenate([order[:low], order[low + ends :]])
        steps = [rng.permutation(order[k : k + self.rows]) for k in range(0, whole, self.rows)]
        chosen = [[rows[k] for k in part] for part in (shared[:head], *steps, shared[head:])]
        return chosen[0], chosen[1:-1], chosen[-1]


def best_fit(shares):
    """Returns the rows that samples are packed into, an array of their numbers each.

    The largest goes first, each into the row that it leaves fullest; dimensions count as much as
    all samples need of them.

    Args:
      shares: f64[n, dims], what each sample takes of a row; none above 1.
    """
    shares = shares[:, _binding(shares)].T
    weights = shares.sum(1) / max(shares.sum(), 1e-30)
    weighed = (weights[:, None] * shares).sum(0)  # `@` rounds as the BLAS of the machine does
    room, filled, used, rows = np.empty((len(shares), 64)), np.zeros(64), 0, []
    for i in np.argsort(-shares.max(0, initial=0), kind="stable"):
        fits = np.ones(used, bool)
        for left, share in zip(room, shares[:, i], strict=True):
            fits &= left[:used] >= share
        row = int(np.where(fits, filled[:used], -1).argmax()) if used else 0
        if not used or not fits[row]:
            row, used = used, used + 1
            rows.append([])
            if used > len(filled):
                room, filled = (np.concatenate([a, np.zeros_like(a)], -1) for a in (room, filled))
            room[:, row] = 1 + 1e-9  # sums of shares round; a slot is more than that
        room[:, row] -= shares[:, i]
        filled[row] += weighed[i]
        rows[row].append(i)
    return [np.array(row, np.int64) for row in rows]


def _binding(shares):
    """Returns the dimensions that can be the first to be full: no other is always fuller."""
    kept = list(range(shares.shape[1]))
    for d in list(kept):
        if any((shares[:, d] <= shares[:, e]).all() for e in kept if e != d):
            kept.remove(d)
    return kept
