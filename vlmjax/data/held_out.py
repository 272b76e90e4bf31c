"""Records that training never draws, to measure the loss on: which, and their packed rows.

sets = of_data(data)                        # what sources of training withhold
sets.append(some(name, source, processor, samples, seed))   # of a source of their own
sizes, bad = measured(sets[0], budget)      # from headers, as a length index is made
rows = Rounds(sets, ..)                     # rows[n], the same again in each round
"""

from typing import NamedTuple

import numpy as np

from vlmjax.data import index
from vlmjax.data.mixture import Mixture, permuted
from vlmjax.data.plan import Plan
from vlmjax.data.reader import PlannedRows, Reader

_SEED = (0, 2**21)  # of records held out: one for all runs, whose stages and seeds may differ


class HeldOut(NamedTuple):
    """Held-out records of one source.

    Attributes:
      name: of the source.
      source, processor: see `reader.Reader`.
      records: i64[n], their numbers.
    """

    name: str
    source: object
    processor: object
    records: np.ndarray

    @property
    def reader(self):
        """A `Reader` of these records alone, by (0, 0), (0, 1), ..."""
        return Reader((self.name,), (self.source,), (self.processor,), [self.records])


def chosen(source, number, what):
    """Returns i64[number]: the records that a source holds out, ascending, whatever the run's seed.

    Args:
      source: see `data.sources`.
      number: how many.
      what: named in the error.

    Raises:
      ValueError: the source has no end, or no more records than that.
    """
    size = len(source) if hasattr(source, "__len__") else None
    if number and (size is None or number >= size):
        raise ValueError(
            f"source {what!r} is to hold out {number} records and has "
            f"{'no end' if size is None else size}: lower its held_out, or name other sources in "
            "eval.sources"
        )
    return np.sort(permuted(np.arange(number), max(size or 1, 1), [_SEED]))


def check(mixed, sources):
    """Raises ValueError where sources with the same records hold out different numbers of them.

    Args:
      mixed: `mix.SourceConfig`s.
      sources: as many, opened.
    """
    if not any(s.held_out for s in mixed):
        return
    first = {}
    for s, source in zip(mixed, sources, strict=True):
        other = first.setdefault(source.fingerprint, s)
        if other.held_out != s.held_out:
            raise ValueError(
                f"sources {other.name!r} and {s.name!r} have the same records and hold out "
                f"{other.held_out} and {s.held_out} of them: one would be trained on what the "
                "other holds out; give both the same held_out"
            )


def of_data(data):
    """Returns the `HeldOut` of each source of a `mix.Data` that holds records out."""
    parts = zip(data.mixed, data.sources, data.processors, strict=True)
    return [
        HeldOut(s.name, source, processor, chosen(source, s.held_out, s.name))
        for s, source, processor in parts
        if s.held_out
    ]


def some(name, source, processor, samples, seed):
    """Returns a `HeldOut` of at most so many records of a source that is held out as a whole.

    They are drawn by the seed; of a source without end they are its first.
    """
    records = np.arange(samples)
    if hasattr(source, "__len__"):
        records = permuted(np.arange(min(samples, len(source))), len(source), [(seed, 2**21)])
    return HeldOut(name, source, processor, np.sort(records))


def measured(part, budget):
    """Returns (`HeldOut` of the usable records, i32[n, sizes] of each, errors of the others).

    Args:
      part: a `HeldOut`.
      budget: `Budget` of the rows.

    Raises:
      ValueError: none is usable.
    """
    sizes, reasons, bad = index.measure(
        part.source, part.processor, budget, "blank", part.records.tolist()
    )
    if reasons.all():
        raise ValueError(
            f"no held-out record of {part.name!r} can be used; the first: {bad[0]['message']}"
            if bad
            else f"source {part.name!r} has no record to measure the loss on"
        )
    return part._replace(records=part.records[reasons == 0]), sizes[reasons == 0], bad


class Rounds:
    """The packed rows of held-out records that one host loads, round after round.

    A sequence without end for `loading.load`: of each part the rows of all its steps, then those of
    the next part, then all of it again.

    Attributes:
      steps: number of steps of each part.
    """

    def __init__(self, parts, sizes, budget, rows, local, form):
        """Plans it.

        Args:
          parts: `HeldOut`s of usable records.
          sizes: i32[n, sizes] of each.
          budget: `Budget` of a row.
          rows: of a step.
          local: numbers of the rows of a step that are wanted.
          form: the `Form` of the model's batches.
        """
        self.rows, self.steps = [], []
        for part, taken in zip(parts, sizes, strict=True):
            n = len(part.records)
            plan = Plan(Mixture([n], [1.0], 0), [taken], (budget,), rows, draws=n)
            self.rows.append(PlannedRows(plan, part.reader, (budget,), form, "token", local))
            self.steps.append(len(plan))
        self.ends = np.cumsum(self.steps) * len(local)

    def __getitem__(self, n):
        """Returns the `reader.Packed` of row n."""
        n %= int(self.ends[-1])
        k = int(np.searchsorted(self.ends, n, "right"))
        return self.rows[k][n - (int(self.ends[k - 1]) if k else 0)]
