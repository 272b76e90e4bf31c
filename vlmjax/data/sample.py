"""What the processor makes of one record: tokens, targets and visual items, all numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PRUNE = ("after_encoder", "before_encoder")


@dataclass(frozen=True, eq=False)
class Item:
    """One image, frame or tile: the patches of one attention segment.

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
    """

    patches: np.ndarray
    grid: tuple[int, int]
    merge: int
    keep: np.ndarray
    prune: str = "after_encoder"

    @property
    def encoded(self):
        """Index of the patches that enter the vision tower: all, or those of kept tokens."""
        before = self.prune == "before_encoder"
        return np.repeat(self.keep, self.merge**2) if before else slice(None)

    @property
    def num_encoded(self):
        """How many patches enter the vision tower."""
        return np.arange(len(self.patches))[self.encoded].size


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenised record; positions are simply 0..n-1.

    Attributes:
      id: the record's id.
      tokens: i32[n], placeholders of the kept visual tokens included.
      labels: i32[n], the token itself where it is trained, -100 elsewhere. Not shifted.
      items: the images and frames in reading order.
      visual: bool[n]; the k-th True slot is filled by the k-th kept visual token of the items in
        order.
    """

    id: str
    tokens: np.ndarray
    labels: np.ndarray
    items: tuple[Item, ...]
    visual: np.ndarray
