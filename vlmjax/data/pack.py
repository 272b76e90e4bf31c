"""Packs samples into the fixed budgets of a `Batch`: first-fit decreasing in a look-ahead pool."""

import dataclasses

import numpy as np

from vlmjax.batch import empty_batch
from vlmjax.data.health import BadRecord
from vlmjax.data.sample import group_bases, number_tokens

NORMALISATIONS = ("token", "sample", "sqrt")


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a batch holds, for metrics and the FLOP count; counts are of real slots, never padding.

    `token_pairs` and `patch_pairs` are the sums of n_i^2 over samples and over images or frames.
    Those of patches, units and features are tuples, one number for each encoder or each source of
    the connector; `features` are those of an encoder that the units gather.
    """

    samples: int
    tokens: int
    supervised: int
    patches: tuple
    units: tuple
    features: tuple
    visual: int
    visual_before_pruning: int
    routed: int
    token_pairs: int
    patch_pairs: tuple
    token_fill: float
    patch_fill: float

    @classmethod
    def total(cls, parts):
        """Returns the `Stats` of the rows of several, as many each."""
        sums = {}
        for field in dataclasses.fields(cls):
            values = [np.asarray(getattr(part, field.name)) for part in parts]
            if field.name.endswith("_fill"):
                sums[field.name] = float(np.mean(values))
            else:
                added = np.sum(values, 0)
                sums[field.name] = tuple(map(int, added)) if added.ndim else int(added)
        return cls(**sums)


def size(sample, budget=None):
    """Returns what a sample takes of the slots of `Budget.limits`.

    A sample without media does not show how many encoders and sources there are; the budget does.
    """
    a, encoders, sources = sample.placed(), 1, 1
    if budget is not None:
        encoders, sources = len(budget.patches), len(budget.visual)
    patches = [0] * encoders
    for item in sample.items:
        patches[item.encoder] += item.num_slots
    units = [len(u.index) for u in a.units] if sample.items else [0] * sources
    pooled = 0 if a.pool is None else len(a.pool.index)
    routed = 0 if a.routed is None else len(a.routed)
    return len(sample.tokens), *patches, *units, pooled, routed


def fits(sizes, budget):
    """Whether what `size` counts fits an empty row."""
    return all(n <= limit for n, limit in zip(sizes, budget.limits, strict=True))


def check_fits(sample, *budgets):
    """Returns `size(sample, budget)`, the same for every budget of a model.

    Raises:
      ValueError: the sample fits an empty row of no budget, or its placeholders do not match its
        media.
    """
    sizes = size(sample, budgets[0])
    over = [
        ", ".join(
            f"{n} {name} (row budget {limit})"
            for name, n, limit in zip(budget.names, sizes, budget.limits, strict=True)
            if n > limit
        )
        for budget in budgets
    ]
    if all(over):
        raise BadRecord(
            "too_long",
            f"record {sample.id!r} has {'; '.join(over)}: it fits no row and is never cut "
            "silently. Raise the row budget of data.budget, or lower the processor's "
            "max_visual_tokens or max_frames",
        )
    kept, slots = sum(int(i.keep.sum()) for i in sample.items), int(sample.visual.sum())
    if sample.placement is None and kept != slots:
        raise BadRecord(
            "placeholders",
            f"record {sample.id!r} has {slots} placeholders for {kept} visual tokens; they "
            "must be equal",
        )
    return sizes


def first_fit(sizes, rows, budget):
    """Assigns items to rows, in the order given, each to the first row with room.

    Args:
      sizes: sequence of what `size` counts.
      rows: number of rows.
      budget: a `Budget`.

    Returns:
      A list with the row of each item, or None where no row had room.
    """
    room = np.tile(np.asarray(budget.limits, np.int64), (rows, 1))
    places = []
    for need in sizes:
        fits = (room >= need).all(1)
        row = int(fits.argmax())
        if fits[row]:
            room[row] -= need
            places.append(row)
        else:
            places.append(None)
    return places


def token_weights(sample, normalisation):
    """Returns f32[n]: weights of the labels of a sample before the batch is normalised to sum 1."""
    supervised = sample.labels[1:] != -100
    n = max(int(supervised.sum()), 1)
    scale = {"token": 1.0, "sample": 1.0 / n, "sqrt": 1.0 / np.sqrt(n)}[normalisation]
    return np.float32(scale) * supervised


def pack(samples_by_row, budget, form, normalisation="token"):
    """Returns (Batch, Stats) of samples already assigned to rows; weights sum to 1.

    Args: as `pack_rows` takes them.
    """
    batch, stats = pack_rows(samples_by_row, budget, form, normalisation)
    return batch._replace(weights=batch.weights / max(float(batch.weights.sum()), 1e-30)), stats


def pack_rows(samples_by_row, budget, form, normalisation="token"):
    """Returns (Batch, Stats) of samples already assigned to rows, some of a step.

    Args:
      samples_by_row: B lists of `Sample`; what a list holds must fit the budget together.
      budget: a `Budget`.
      form: the `Form` of the model's batches.
      normalisation: of the loss over the whole batch. "token": every supervised token counts the
        same; "sample": every sample; "sqrt": samples count with the square root of their supervised
        tokens. The train step makes the weights of all its rows sum to 1.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"normalisation={normalisation!r} is unknown; choose one of {NORMALISATIONS}"
        )
    batch = empty_batch(len(samples_by_row), budget, form)
    token_pairs, patch_pairs = 0, np.zeros(len(budget.patches), np.int64)
    for row, samples in enumerate(samples_by_row):
        used, out = (np.zeros(len(n), np.int64) for n in (budget.limits, budget.patches))
        for number, sample in enumerate(samples, 1):
            _place_text(batch, row, number, sample, used[0], normalisation)
            _place_visual(batch, row, sample, used, out, budget, form)
            token_pairs += len(sample.tokens) ** 2
            for item in sample.items:
                patch_pairs[item.encoder] += item.num_slots**2
                out[item.encoder] += item.num_out
            used += size(sample, budget)
    supervised, visual = (int(n) for n in ((batch.weights > 0).sum(), (batch.source >= 0).sum()))
    items = [item for row in samples_by_row for sample in row for item in sample.items]
    stats = Stats(
        samples=sum(map(len, samples_by_row)),
        tokens=int((batch.segments > 0).sum()),
        supervised=supervised,
        patches=tuple(int((p.segments > 0).sum()) for p in batch.patches),
        units=tuple(int((u.index >= 0).any(-1).sum()) for u in batch.units),
        features=tuple(int((u.index != -1).sum()) for u in batch.units),
        visual=visual,
        visual_before_pruning=visual + sum(int((~i.keep).sum()) for i in items),
        routed=0 if batch.routed is None else int((batch.routed.slots >= 0).sum()),
        token_pairs=token_pairs,
        patch_pairs=tuple(map(int, patch_pairs)),
        token_fill=float((batch.segments > 0).mean()),
        patch_fill=float(np.mean([(p.segments > 0).mean() for p in batch.patches]))
        if batch.has_vision
        else 0.0,
    )
    return batch, stats


def _place_text(batch, row, number, sample, at, normalisation):
    n, positions = len(sample.tokens), sample.placed().positions
    slots, before = slice(at, at + n), slice(at, at + n - 1)
    batch.tokens[row, slots] = sample.tokens
    batch.positions[row, slots] = np.arange(n) if positions is None else positions
    batch.segments[row, slots] = number
    batch.targets[row, before] = np.maximum(sample.labels[1:], 0)
    batch.weights[row, before] = token_weights(sample, normalisation)


def _place_visual(batch, row, sample, used, first_out, budget, form):
    """Adds the visual part of a sample to a row.

    Args:
      used: the slots of `budget.limits` that the row has in use.
      first_out: the same of each encoder's output.
    """
    a, encoders = sample.placed(), len(budget.patches)
    at, first_unit = used[1 : 1 + encoders].copy(), used[1 + encoders : -2]
    for item in sample.items:
        patches, slots = batch.patches[item.encoder], slice(at[item.encoder], None)
        m = item.num_slots
        if not m:
            continue
        patches.pixels[row, slots][item.prefix : m] = item.patches[item.encoded]
        patches.segments[row, slots][:m] = patches.segments[row].max() + 1
        patches.coords[row, slots][:m] = item.slot_coords()
        at[item.encoder] += m
    table = np.zeros(0, np.int64)  # visual token of the sample -> of the row
    if sample.items:
        for k, units in enumerate(a.units):
            _place_units(batch.units[k], row, units, first_unit[k], first_out[form.encoders[k]])
        counts = [len(u.index) for u in a.units]
        table = number_tokens(form, counts, first_unit, group_bases(form, budget.visual))
    if a.pool is not None:
        index = np.where(a.pool.index >= 0, table[a.pool.index], -1)
        _place_units(batch.pool, row, a.pool._replace(index=index), used[-2], 0)
        table = used[-2] + np.arange(len(index))
    t, n = used[0], len(sample.tokens)
    source = np.append(table, -1)[np.maximum(a.source, -1)]
    batch.source[row, t : t + n] = np.where(
        a.source < -1, form.visual(budget) - 2 - a.source, source
    )
    if a.routed is not None:
        served = np.flatnonzero(a.routed >= 0)
        batch.routed.slots[row, used[-1] + served] = t + a.routed[served]
        batch.routed.index[row, t + a.routed[served]] = used[-1] + served


def _place_units(into, row, units, at, first):
    """Writes units behind the `at` that a row has; their slots are counted from `first` on."""
    n, group = units.index.shape
    index = np.where(units.index < -1, units.index - first, units.index + first)  # of -2 - slot
    into.index[row, at : at + n, :group] = np.where(units.index == -1, -1, index)
    if into.weights is not None:
        into.weights[row, at : at + n, :group] = units.weights
    if into.size is not None:
        into.size[row, at : at + n] = units.size
