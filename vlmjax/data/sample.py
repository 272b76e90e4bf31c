"""What the processor makes of one record: tokens, targets and visual items, all numpy."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from vlmjax.batch import Units

PRUNE = ("after_encoder", "before_encoder")


@functools.lru_cache(maxsize=64)
def window_coords(h, w, merge):
    """Returns f32[h*w, 2], the (row, column) of each patch in merge-window-major order.

    Example, h=2, w=4, merge=2: (0,0) (0,1) (1,0) (1,1), (0,2) (0,3) (1,2) (1,3).
    """
    coords = np.stack(np.mgrid[:h, :w], -1).reshape(h // merge, merge, w // merge, merge, 2)
    return coords.swapaxes(1, 2).reshape(h * w, 2).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Item:
    """One view of an encoder (an image, frame or tile): the patches of one attention segment.

    Attributes:
      patches: u8[h * w, C * p * p] raw pixels (normalised on the device). Rows are
        merge-window-major (2x2 windows: (0,0), (0,1), (1,0), (1,1), (0,2), ...), each row is
        channel-major (C, p, p).
      grid: (h, w) in patches.
      merge: side of the window of patches that becomes one visual token.
      keep: bool[(h // merge) * (w // merge)], True where the visual token reaches the language
        model.
      prune: where the others leave, one of `PRUNE`: the vision tower sees the whole frame and they
        are dropped from its output, or their patches never enter it.
      encoder: which of them sees it.
      prefix: slots in front of the patches for class and register tokens.
      coords: f32[h * w, 2] of the patches for the encoder's positions; None = row and column.
      out: slots of the encoder's output; None = as many as of its input.
    """

    patches: np.ndarray
    grid: tuple[int, int]
    merge: int
    keep: np.ndarray
    prune: str = "after_encoder"
    encoder: int = 0
    prefix: int = 0
    coords: np.ndarray | None = None
    out: int | None = None

    @property
    def encoded(self):
        """Index of the patches that enter the vision tower: all, or those of kept tokens."""
        before = self.prune == "before_encoder"
        return np.repeat(self.keep, self.merge**2) if before else slice(None)

    @property
    def num_encoded(self):
        """How many patches enter the vision tower."""
        return np.arange(len(self.patches))[self.encoded].size

    @property
    def num_slots(self):
        """How many slots of the encoder's buffer it takes."""
        return self.num_encoded and self.prefix + self.num_encoded

    @property
    def num_out(self):
        """How many slots of the encoder's output it takes."""
        return self.num_slots if self.out is None else self.out

    def slot_coords(self):
        """Returns f32[num_slots, 2], with -1 - k in front for the k-th prefix token."""
        coords = window_coords(*self.grid, self.merge) if self.coords is None else self.coords
        prefix = -1 - np.arange(self.prefix, dtype=np.float32)
        return np.concatenate([np.repeat(prefix[:, None], 2, 1), coords[self.encoded]])


def number_tokens(form, counts, before, bases):
    """Returns i64[n]: the numbers of visual tokens, in order, in a larger whole.

    Args:
      form: a `batch.Form`.
      counts: units of each source here.
      before: units of each source that come first there.
      bases: where the tokens of each group begin there.
    """
    runs = [
        base + tokens * before[sources[0]] + np.arange(tokens * counts[sources[0]])
        for (sources, tokens), base in zip(form.groups, bases, strict=True)
    ]
    return np.concatenate(runs)


def group_bases(form, counts):
    """Returns where the tokens of each group begin behind those of `counts` units a source."""
    sizes = [tokens * counts[sources[0]] for sources, tokens in form.groups]
    return np.cumsum([0, *sizes[:-1]])


@dataclass(frozen=True, eq=False)
class Placement:
    """How the visual tokens of a sample come about and where they go.

    Attributes:
      units: of each source of the connector, without the axis B; `index` counts the output slots
        of the items of its encoder in this sample.
      source: i32[n]; the visual token of a slot (those of the first group of the connector come
        first), -1 for text, -2 - k for the k-th special vector.
      pool: `Units` over the visual tokens, after which `source` counts pooled ones; or None.
      positions: i32[n] of the tokens; None = 0..n-1.
      routed: i32[w]; the token slots that parameters of their own serve, -1 = none; or None.
    """

    units: tuple[Units, ...]
    source: np.ndarray
    pool: Units | None = None
    positions: np.ndarray | None = None
    routed: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenised record.

    Attributes:
      id: the record's id.
      tokens: i32[n], placeholders of the kept visual tokens included.
      labels: i32[n], the token itself where it is trained, -100 elsewhere. Not shifted.
      items: the images and frames in reading order.
      visual: bool[n]; True where a visual token or a special vector takes the slot.
      placement: None = the k-th visual slot is filled by the k-th kept visual token of the items
        in order, a window of patches each.
      repairs: {what was changed to make it usable, or left out: how often}.
    """

    id: str
    tokens: np.ndarray
    labels: np.ndarray
    items: tuple[Item, ...]
    visual: np.ndarray
    placement: Placement | None = None
    repairs: dict = field(default_factory=dict)

    def placed(self):
        """Returns its `Placement`."""
        if self.placement is not None:
            return self.placement
        group = max((item.merge**2 for item in self.items), default=1)
        index = np.full((sum(int(i.keep.sum()) for i in self.items), group), -1, np.int32)
        unit = slot = 0
        for item in self.items:
            places = np.full(len(item.patches), -1, np.int32)
            places[item.encoded] = slot + item.prefix + np.arange(item.num_encoded)
            windows = places.reshape(-1, item.merge**2)[item.keep]
            index[unit : unit + len(windows), : windows.shape[1]] = windows
            unit, slot = unit + len(windows), slot + item.num_slots
        source = np.where(self.visual, np.cumsum(self.visual) - 1, -1).astype(np.int32)
        return Placement((Units(index),), source)
