"""From the numbers of records to samples and packed rows, with those that cannot be used named."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from vlmjax.batch import Batch
from vlmjax.data.health import BadRecord
from vlmjax.data.pack import Stats, check_fits, pack_rows
from vlmjax.data.plan import Mark


class Reader:
    """(source, record) -> Sample; picklable, so that workers have it as well."""

    def __init__(self, names, sources, processors, records=None):
        """Makes it.

        Args:
          names: of the sources, in reports.
          sources: see `data.sources`.
          processors: record -> Sample, for each source.
          records: for each source the numbers of the records in use, None = all as they are.
        """
        self.names, self.sources, self.processors = tuple(names), sources, processors
        self.records = records or [None] * len(sources)

    def number(self, source, record):
        """Returns the number that a record in use has in its source."""
        chosen = self.records[source]
        return int(record if chosen is None else chosen[record])

    def id(self, source, record):
        """Returns the id of a record, whatever is wrong with it."""
        return self.sources[source].id(self.number(source, record))

    def __call__(self, source, record):
        """Returns the sample; BadRecord where it cannot be used, ValueError with its id else."""
        number = self.number(source, record)
        try:
            return self.processors[source](self.sources[source][number])
        except BadRecord:
            raise
        except (ValueError, OSError) as error:
            where = f"record {self.sources[source].id(number)!r} of {self.names[source]!r}"
            raise ValueError(f"{where}: {error}") from error


class Bad(NamedTuple):
    """A record that could not be used, as `health.Ledger.record` takes it."""

    source: str
    id: str
    reason: str
    message: str


class Packed(NamedTuple):
    """A row by itself: a `Batch` with B = 1 whose weights are not normalised."""

    bucket: int
    batch: Batch
    stats: Stats
    ids: tuple
    bad: tuple
    repairs: dict
    mark: Mark  # from which the plan finds its step


class PlannedRows:
    """The rows of a plan that one host loads, as a sequence: all of a step, then the next."""

    def __init__(self, plan, reader, budgets, form, normalisation, local):
        """Makes the sequence.

        Args:
          plan: a `Plan`.
          reader: a `Reader`.
          budgets: of the buckets.
          form: the `Form` of the model's batches.
          normalisation: see `pack`.
          local: numbers of the rows of a step that are wanted.
        """
        self.plan, self.reader, self.budgets = plan, reader, budgets
        self.form, self.normalisation, self.local = form, normalisation, tuple(local)

    def __getitem__(self, n):
        """Returns a `Packed`; a record that cannot be used leaves its slots empty."""
        step, row = divmod(n, len(self.local))
        mark, (bucket, rows) = self.plan.mark(step), self.plan[step]
        budget, samples, bad = self.budgets[bucket], [], []
        planned = self.plan.taken(rows[self.local[row]])
        spare = np.array(budget.limits) - planned.sum(0)
        for (source, record), room in zip(rows[self.local[row]], planned, strict=True):
            try:
                sample = self.reader(source, record)
                spare = _spared(sample, check_fits(sample, budget), room, spare)
                samples.append(sample)
            except BadRecord as error:
                where = self.reader.names[source], self.reader.id(source, record)
                bad.append(Bad(*where, error.reason, str(error)))
        batch, stats = pack_rows([samples], budget, self.form, self.normalisation)
        return Packed(
            bucket,
            batch,
            stats,
            tuple(s.id for s in samples),
            tuple(bad),
            repairs_of(samples),
            mark,
        )


def _spared(sample, sizes, planned, spare):
    """Returns the slots of a row that are left beside what is planned; BadRecord if too few."""
    left = spare - np.maximum(np.array(sizes) - planned, 0)
    if (left < 0).any():
        raise BadRecord(
            "too_long",
            f"record {sample.id!r} takes {sizes} slots where its length index says "
            f"{tuple(planned.tolist())}, and its row has no room for more: its media have changed, "
            "make the index in another folder",
        )
    return left


def repairs_of(samples):
    """Returns {what was repaired: how often} of samples."""
    return dict(sum((Counter(s.repairs) for s in samples), Counter()))


def join_rows(packed):
    """Returns (Batch, Stats) of `Packed` rows, one after another."""
    batches, stats = [p.batch for p in packed], [p.stats for p in packed]
    return joined(batches), Stats.total(stats)


def joined(batches):
    """Returns one `Batch` of the rows of several."""
    first = batches[0]
    if first is None or isinstance(first, np.ndarray):
        return None if first is None else np.concatenate(batches)
    parts = [joined(parts) for parts in zip(*batches, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
