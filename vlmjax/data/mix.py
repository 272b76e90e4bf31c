"""The `data` section of a config: which sources, in which shares, how they are packed and loaded.

data = open_data(config, make_processor, seed)      # sources that are absent are named
mixture, reader, identity = streamed(data)          # packed as they come
plan, reader, identity, indices = planned(data, budgets, rows)      # or from length indices
"""

import dataclasses
import hashlib
import json
import math
import numbers
import re
from pathlib import Path

import numpy as np

from vlmjax.data import held_out, index
from vlmjax.data.mixture import Mixture, permuted
from vlmjax.data.plan import BALANCE, VERSION, Plan
from vlmjax.data.reader import Reader
from vlmjax.data.shards import AbsentFiles
from vlmjax.data.sources import open_source

NUMPY = ".".join(np.__version__.split(".")[:2])  # which may draw other numbers from one seed


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A source of a mixture; exactly one of weight, epochs and group says how much of it is drawn.

    Attributes:
      spec: "KIND:WHERE", see `data.sources`.
      name: in reports and metrics; "" = the spec.
      weight: share of the draws, relative to the others'.
      epochs: how often each of its records is drawn, relative to the others'.
      group: a name of `DataConfig.groups`, whose weight its sources share by number of records.
      cap: at most so many of its records, chosen by the seed of the run; 0 = all.
      held_out: so many of its records are never drawn, the same in every run: `EvalConfig.every`
        and the `eval` command measure the loss on them.
      processor: settings that differ from the run's, such as (("image_merge", 2), ("fps", 0.5)).
      media_root: folder of its media; "" = that of the run.
    """

    spec: str
    name: str = ""
    weight: float = 0.0
    epochs: float = 0.0
    group: str = ""
    cap: int = 0
    held_out: int = 0
    processor: tuple = ()
    media_root: str = ""

    def __post_init__(self):
        given = [k for k in ("weight", "epochs", "group") if getattr(self, k)]
        wrong = [x for x in (self.weight, self.epochs, self.cap, self.held_out) if not _amount(x)]
        if len(given) != 1 or wrong or self.cap % 1 or self.held_out % 1:
            raise ValueError(
                f"source {self.spec!r} has weight={self.weight}, epochs={self.epochs}, "
                f"group={self.group!r}, cap={self.cap}, held_out={self.held_out}: give one of the "
                "first three, above 0; the last two are numbers of records"
            )
        if not self.name:
            object.__setattr__(self, "name", self.spec)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data.

    Attributes:
      sources: (spec, weight) or the settings of a `SourceConfig`, each.
      tokenizer: directory of a fast tokenizer, or "demo".
      budget: (tokens, patches, visual tokens, patches of a visual token) of a row, each but the
        first a tuple where there are several encoders or sources; or (tokens, views), so many views
        of the first encoder, where the processor has `picture`.
      buckets: further budgets; the rows of a step all have one of them or `budget`, whichever the
        waiting samples use best, e.g. ((16384, 0, 0, 4),) for text-only steps. These run no vision
        tower: its gradient is zero there, while moments and weight decay go on; they are of no use
        to a stage that trains nothing else.
      normalisation: of the loss, "token", "sample" or "sqrt".
      media_root: folder that media paths of sources are relative to; they may not leave it.
      groups: ((name, weight), ...).
      absent: "error" where a source is not there, or "report": what is absent is said before the
        first step, and the others of its group share the weight.
      pool: samples of look-ahead where rows are packed as records come, without an index.
      index: folder of the length indices that `vlmjax.main data index` makes; rows are planned
        then. "" = no index: every host reads all samples and packs them as they come.
      window, balance: of a plan, see `data.plan.Plan`.
      epochs: of a plan: it ends where every record was drawn so often, the last step perhaps with
        empty rows; 0 = without end.
      workers: processes that load planned rows, or samples where there is no index; 0 = a thread.
      ahead: rows (samples) that a host loads ahead of the device, over all workers.
      stall: seconds without one after which a worker counts as lost.
      quota: share of a source's records that may be unusable before the run stops.
      changed_at: the step of the checkpoint from which a run goes on with these data instead of
        others; they begin anew there.
    """

    sources: tuple
    tokenizer: str
    budget: tuple
    buckets: tuple = ()
    normalisation: str = "token"
    media_root: str = "."
    groups: tuple = ()
    absent: str = "error"
    pool: int = 64
    index: str = ""
    window: int = 32768
    balance: str = "step"
    epochs: float = 0.0
    workers: int = 0
    ahead: int = 16
    stall: float = 300.0
    quota: float = 0.001
    changed_at: int = 0

    def __post_init__(self):
        for name, budgets in (("budget", (self.budget,)), ("buckets", self.buckets)):
            if any(_wrong(b, self.budget) for b in budgets):
                raise ValueError(
                    f"data.{name}={getattr(self, name)} needs four numbers: tokens, patches, "
                    "visual tokens, patches of a visual token; or two, tokens and views of "
                    "pictures; buckets is a tuple of such tuples, the last number that of "
                    "data.budget"
                )
        for name, known in (("absent", ("error", "report")), ("balance", BALANCE)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"data.{name}={getattr(self, name)!r} is unknown; choose one of {known}"
                )
        if not _amount(self.epochs) or self.epochs and not self.index:
            raise ValueError(
                f"data.epochs={self.epochs} with data.index={self.index!r}: give a number above 0 "
                "with an index, where the end is known, or 0 for a run without end"
            )
        if not all(_amount(weight) and weight for _, weight in self.groups):
            raise ValueError(f"data.groups={self.groups}: give each a name and a weight above 0")
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one, (('json:FILE', 1.0),)")
        named = [s.name for s in self.mixed]
        if twice := sorted({n for n in named if named.count(n) > 1}):
            raise ValueError(f"data.sources has {twice} twice; give them names of their own")
        kinds = {"epochs" if s.epochs else "weight" for s in self.mixed}
        unknown = sorted({s.group for s in self.mixed} - {"", *dict(self.groups)})
        if len(kinds) > 1 or unknown:
            raise ValueError(
                "data.sources mixes epochs with weights or groups; use one of the two"
                if len(kinds) > 1
                else f"data.groups lacks {unknown}, which sources belong to; give their weights"
            )

    @property
    def mixed(self):
        """The sources, a `SourceConfig` each."""
        return tuple(map(_source, self.sources))


def _amount(value):
    """Whether a value is a number that something can be drawn by: 0 or more, and finite."""
    return isinstance(value, numbers.Real) and math.isfinite(value) and value >= 0


def _wrong(budget, first):
    """Whether a budget has neither two nor four numbers, the last that of the first budget."""
    if not isinstance(budget, (tuple, list)) or len(budget) not in (2, 4):
        return True
    return len(budget) == 4 and budget[3] != first[-1]


def _source(entry):
    if not isinstance(entry, dict):
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise ValueError(
                f"data.sources has {entry!r}: a source is ('KIND:WHERE', weight) or the settings "
                "of a SourceConfig; add what is missing"
            )
        spec, weight = entry
        return SourceConfig(spec, weight=weight)
    known = {f.name for f in dataclasses.fields(SourceConfig)}
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"data.sources: {unknown} is unknown; allowed are {sorted(known)}")
    processor = dict(entry.get("processor", ()))
    return SourceConfig(**entry | {"processor": tuple(sorted(processor.items()))})


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Sources that are there, with the processor of each.

    Attributes:
      config: a `DataConfig`.
      seed: of the order.
      mixed: their `SourceConfig`s.
      sources, processors: as many.
      absent: names of those that are not there.
    """

    config: DataConfig
    seed: int
    mixed: tuple
    sources: tuple
    processors: tuple
    absent: tuple

    @property
    def names(self):
        """Of the sources."""
        return tuple(s.name for s in self.mixed)

    def sizes(self):
        """Returns {name: number of records}, inf for a source without end."""
        return {
            s.name: len(source) if hasattr(source, "__len__") else np.inf
            for s, source in zip(self.mixed, self.sources, strict=True)
        }


def open_data(config, make_processor, seed):
    """Returns the `Data` of a `DataConfig`.

    Args:
      config: of the run.
      make_processor: settings that differ, as a dict -> `Processor`.
      seed: of the run.

    Raises:
      ValueError: a source is absent where that is an error, or all are.
    """
    opened, absent, made = [], {}, {}
    for s in config.mixed:
        try:
            folder = index_folder(config, s.name) if config.index else None
            root = s.media_root or config.media_root
            opened.append((s, open_source(s.spec, root, seed, folder)))
        except AbsentFiles as error:
            absent[s.name] = str(error)
            continue
        if s.processor not in made:
            made[s.processor] = make_processor(dict(s.processor))
            _check_processor(s, made[s.processor], config.budget)
    if absent and (config.absent == "error" or not opened):
        raise ValueError(
            f"{len(absent)} of {len(config.mixed)} sources are not there:\n  "
            + "\n  ".join(f"{name}: {why}" for name, why in absent.items())
            + "\ncorrect data.sources, or set data.absent='report' to train on the rest"
        )
    mixed, sources = zip(*opened, strict=True)
    held_out.check(mixed, sources)
    processors = tuple(made[s.processor] for s in mixed)
    return Data(config, seed, mixed, sources, processors, tuple(absent))


def _check_processor(source, processor, budget):
    """Patches in native size must be those of the model, their windows not larger than its units.

    Models that see pictures in another way bring their own size; a processor of tests has no model.
    """
    settings, form = processor.config, processor.form
    if settings.picture is not None or form is None or not form.towers[0].patch:
        return
    side, group = max(settings.image_merge, settings.video_merge), np.min(budget[-1])
    if settings.patch != form.towers[0].patch or side**2 > group:
        raise ValueError(
            f"source {source.name!r} is processed with patch={settings.patch}, image_merge="
            f"{settings.image_merge}, video_merge={settings.video_merge}; the model has patch="
            f"{form.towers[0].patch} and data.budget at most {group} patches of a visual token: "
            "correct the processor, or the last number of data.budget"
        )


def weights(data, counts):
    """Returns the weight of each source, of so many usable records each (None = without end)."""
    groups, total = dict(data.config.groups), {}
    for s, count in zip(data.mixed, counts, strict=True):
        if count is None and not s.weight:
            raise ValueError(
                f"source {s.name!r} has no end: give it a weight instead of epochs or a group"
            )
        if s.group:
            total[s.group] = total.get(s.group, 0) + count
    return [
        s.weight or (s.epochs * n if s.epochs else groups[s.group] * n / total[s.group])
        for s, n in zip(data.mixed, counts, strict=True)
    ]


def _chosen(data, k, usable):
    """Returns the records of a source in use: of those given (None = all) what is not held out, or
    as many of these as its cap."""
    cap, source = data.mixed[k].cap, data.sources[k]
    held = held_out.chosen(source, data.mixed[k].held_out, data.names[k])
    if len(held):
        free = np.ones(len(source), bool)
        free[held] = False
        usable = np.flatnonzero(free) if usable is None else usable[free[usable]]
    if not cap or not hasattr(source, "__len__"):
        return usable
    usable = np.arange(len(source)) if usable is None else usable
    kept = permuted(np.arange(min(cap, len(usable))), len(usable), [(data.seed, 0)])
    return np.sort(usable[kept])


def _limits(s):
    """What an identity has of the records of a `SourceConfig` that are left out."""
    return [s.cap, s.held_out] if s.held_out else [s.cap]


def _mixture(data, records):
    """Returns (Mixture, Reader, weights) of the records in use."""
    counts = [
        (len(s) if hasattr(s, "__len__") else None) if r is None else len(r)
        for s, r in zip(data.sources, records, strict=True)
    ]
    if 0 in counts:
        raise ValueError(f"source {data.names[counts.index(0)]!r} has no record that can be used")
    shares = weights(data, counts)
    reader = Reader(data.names, data.sources, data.processors, records)
    return Mixture(counts, shares, data.seed), reader, shares


def streamed(data):
    """Returns (Mixture, Reader, identity) of data that are packed as they come."""
    records = [_chosen(data, k, None) for k in range(len(data.sources))]
    mixture, reader, shares = _mixture(data, records)
    identity = {"packing": "stream", "seed": data.seed, "numpy": NUMPY} | {
        f"source {s.name}": [source.fingerprint, weight, *_limits(s)]
        for s, source, weight in zip(data.mixed, data.sources, shares, strict=True)
    }
    return mixture, reader, json.loads(json.dumps(identity))


def index_folder(config, name):
    """Returns the folder of the length index of a source."""
    readable = re.sub(r"[^\w.-]+", "_", name)[-60:]
    return Path(config.index) / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def open_indices(data, budget):
    """Returns the `index.Index` of each source; ValueError for those that are not made."""
    found = []
    for name, source, processor in zip(data.names, data.sources, data.processors, strict=True):
        if not hasattr(source, "__len__"):
            raise ValueError(
                f"source {name!r} has no end and so no index: leave it out, or set data.index=''"
            )
        folder = index_folder(data.config, name)
        found.append(index.open_index(folder, source, processor, budget))
    return found


def planned(data, budgets, rows):
    """Returns (Plan, Reader, identity, indices) of data that have length indices.

    Args:
      data: a `Data`.
      budgets: of the buckets.
      rows: of a step.
    """
    config, indices = data.config, open_indices(data, budgets[0])
    records = [
        _chosen(data, k, None if len(found.usable) == len(found.sizes) else found.usable)
        for k, found in enumerate(indices)
    ]
    mixture, reader, shares = _mixture(data, records)
    sizes = [_Sizes(found.folder, r) for found, r in zip(indices, records, strict=True)]
    identity = {
        "packing": f"plan {VERSION}",
        "seed": data.seed,
        "numpy": NUMPY,
        "rows": rows,
        "budgets": [list(b.limits) for b in budgets],
        "window": config.window,
        "balance": config.balance,
        "epochs": config.epochs,
        "changed_at": config.changed_at,
    } | {
        f"source {s.name}": [found.digest, weight, *_limits(s)]
        for s, found, weight in zip(data.mixed, indices, shares, strict=True)
    }
    draws = mixture.epochs(config.epochs) if config.epochs else None
    how = dict(window=config.window, balance=config.balance, draws=draws)
    plan = Plan(mixture, sizes, budgets, rows, **how)
    return plan, reader, json.loads(json.dumps(identity)), indices


class _Sizes:
    """Lengths of the records in use, read from the index as they are asked for, in any process."""

    def __init__(self, folder, records):
        self.folder, self.records = folder, records
        self.sizes = index.open_sizes(folder)

    def __reduce__(self):
        return _Sizes, (self.folder, self.records)

    def __getitem__(self, at):
        return self.sizes[at if self.records is None else self.records[at]]
