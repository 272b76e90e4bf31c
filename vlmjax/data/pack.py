"""Packs samples into the fixed budgets of a `Batch`: first-fit decreasing in a look-ahead pool."""

import dataclasses
import functools

import numpy as np

from vlmjax.batch import empty_batch

NORMALISATIONS = ("token", "sample", "sqrt")


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a batch holds, for metrics and the FLOP count; counts are of real slots, never padding.

    `token_pairs` and `patch_pairs` are the sums of n_i^2 over samples and over images or frames.
    """

    samples: int
    tokens: int
    supervised: int
    patches: int
    visual: int
    visual_before_pruning: int
    token_pairs: int
    patch_pairs: int
    token_fill: float
    patch_fill: float


def size(sample):
    """Returns (tokens, patches, visual tokens) that a sample takes."""
    return len(sample.tokens), sum(i.num_encoded for i in sample.items), int(sample.visual.sum())


def fits(sizes, budget):
    """Whether (tokens, patches, visual tokens) fit an empty row."""
    return all(n <= limit for n, limit in zip(sizes, budget, strict=False))


def check_fits(sample, *budgets):
    """Returns `size(sample)`.

    Raises:
      ValueError: the sample fits an empty row of no budget, or its placeholders do not match its
        media.
    """
    sizes = size(sample)
    names = "tokens", "patches", "visual tokens"
    over = [
        ", ".join(
            f"{n} {name} (row budget {limit})"
            for name, n, limit in zip(names, sizes, budget, strict=False)
            if n > limit
        )
        for budget in budgets
    ]
    if all(over):
        raise ValueError(
            f"record {sample.id!r} has {'; '.join(over)}: it fits no row and is never cut "
            "silently. Raise the row budget of data.budget, or lower the processor's "
            "max_visual_tokens or max_frames"
        )
    kept = sum(int(i.keep.sum()) for i in sample.items)
    if kept != sizes[2]:
        raise ValueError(
            f"record {sample.id!r} has {sizes[2]} placeholders for {kept} visual tokens; they "
            "must be equal"
        )
    return sizes


def first_fit(sizes, rows, budget):
    """Assigns items to rows, in the order given, each to the first row with room.

    Args:
      sizes: sequence of (tokens, patches, visual tokens).
      rows: number of rows.
      budget: a `Budget`.

    Returns:
      A list with the row of each item, or None where no row had room.
    """
    room = np.tile(np.asarray(budget[:3], np.int64), (rows, 1))
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


@functools.lru_cache(maxsize=4096)
def window_coords(h, w, merge):
    """Returns i32[h*w, 2], the (row, column) of each patch in merge-window-major order.

    Example, h=2, w=4, merge=2: (0,0) (0,1) (1,0) (1,1), (0,2) (0,3) (1,2) (1,3).
    """
    coords = np.stack(np.mgrid[:h, :w], -1).reshape(h // merge, merge, w // merge, merge, 2)
    return coords.swapaxes(1, 2).reshape(h * w, 2).astype(np.int32)


def token_weights(sample, normalisation):
    """Returns f32[n]: weights of the labels of a sample before the batch is normalised to sum 1."""
    supervised = sample.labels[1:] != -100
    n = max(int(supervised.sum()), 1)
    scale = {"token": 1.0, "sample": 1.0 / n, "sqrt": 1.0 / np.sqrt(n)}[normalisation]
    return np.float32(scale) * supervised


def pack(samples_by_row, budget, patch_dim, normalisation="token"):
    """Returns (Batch, Stats) of samples already assigned to rows.

    Args:
      samples_by_row: B lists of `Sample`; what a list holds must fit the budget together.
      budget: a `Budget`.
      patch_dim: values in a patch row.
      normalisation: of the loss over the whole batch. "token": every supervised token counts the
        same; "sample": every sample; "sqrt": samples count with the square root of their supervised
        tokens. Weights sum to 1.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"normalisation={normalisation!r} is unknown; choose one of {NORMALISATIONS}"
        )
    batch = empty_batch(len(samples_by_row), budget, patch_dim)
    before = token_pairs = patch_pairs = 0
    for row, samples in enumerate(samples_by_row):
        t = p = u = segment = 0
        for number, sample in enumerate(samples, 1):
            n = len(sample.tokens)
            slots = slice(t, t + n)
            batch.tokens[row, slots] = sample.tokens
            batch.positions[row, slots] = np.arange(n)
            batch.segments[row, slots] = number
            batch.targets[row, t : t + n - 1] = np.maximum(sample.labels[1:], 0)
            batch.weights[row, t : t + n - 1] = token_weights(sample, normalisation)
            batch.source[row, slots][sample.visual] = u + np.arange(int(sample.visual.sum()))
            for item in sample.items:
                encoded, m = item.encoded, item.num_encoded
                segment += m > 0
                batch.patches[row, p : p + m] = item.patches[encoded]
                batch.patch_segments[row, p : p + m] = segment
                coords = window_coords(*item.grid, item.merge)
                batch.patch_coords[row, p : p + m] = coords[encoded]
                places = np.zeros(len(item.patches), np.int32)
                places[encoded] = np.arange(p, p + m)
                group = item.merge**2
                windows = places.reshape(-1, group)[item.keep]
                batch.windows[row, u : u + len(windows), :group] = windows
                before, u, p = before + len(item.keep), u + len(windows), p + m
                patch_pairs += m * m
            token_pairs, t = token_pairs + n * n, t + n
    supervised = int((batch.weights > 0).sum())
    batch = batch._replace(weights=batch.weights / max(float(batch.weights.sum()), 1e-30))
    stats = Stats(
        samples=sum(map(len, samples_by_row)),
        tokens=int((batch.segments > 0).sum()),
        supervised=supervised,
        patches=int((batch.patch_segments > 0).sum()),
        visual=int((batch.source >= 0).sum()),
        visual_before_pruning=before,
        token_pairs=token_pairs,
        patch_pairs=patch_pairs,
        token_fill=float((batch.segments > 0).mean()),
        patch_fill=float((batch.patch_segments > 0).mean()) if budget.patches else 0.0,
    )
    return batch, stats
