"""The packed `Batch`: the only thing that crosses from the host to the device.

Made by the host (numpy), consumed by the device (jax); a NamedTuple, so it is a jax
pytree without importing jax.

A batch has B independent rows with fixed budgets: T token slots, P patch slots and U visual-token
slots. Several samples share a row; a sample never spans two rows, so nothing about a row ever needs
another row. Example of one row with T=12, P=9, U=3 and merge size 2 holding an image of 2x4 patches
(two visual tokens) and a text-only sample:

    tokens     <u> <img> <img> what ? <a> cat <e> | hi <e> | - -
    segments    1    1     1    1   1  1   1   1  |  2  2  | 0 0      0 is padding
    positions   0    1     2    3   4  5   6   7  |  0  1  | 0 0      restart at 0 in each sample
    source     -1    0     1   -1  -1 -1  -1  -1  | -1 -1  | -1 -1    visual token of the slot
    targets     .    .     .    .   . cat <e>  .  | <e> .  | . .      the next token (shifted)
    weights     0    0     0    0   0  1   1   0  |  1  0  | 0 0      of each target in the loss

    patch_segments  1 1 1 1 1 1 1 1 0       one segment per image, frame or tile
    windows         (0 1 2 3) (4 5 6 7) (-1 -1 -1 -1)   the patches that form each kept visual token
"""

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class UnitRule:
    """Which patches a connector maps at once: a window of a grid, or a whole map.

    A grid is that of a view, or of several views laid side by side. In a list of units, i32[U, G]
    slots of the encoder's output, -1 is no patch (the connector reads zeros) and -2 - slot a patch
    that is there but must not be attended to.

    Attributes:
      kind: "window" or "map".
      side: rows and columns of a window; its patches come in reading order.
      pad: whether windows at the right and bottom edge may be incomplete; otherwise the rest of the
        grid is left out.
      order: of windows, "row" or "column" after column; of the patches of a map, "row" or "cell"
        after cell of an `out` grid of equal rectangles.
      out: rows and columns of the tokens of a map, None where a token has no place in it.
      prefix: slots in front of the patches of a map: class token, registers.
    """

    kind: str = "window"
    side: int = 1
    pad: bool = True
    order: str = "row"
    out: tuple[int, int] | None = None
    prefix: int = 0

    def __post_init__(self):
        orders = {"window": ("row", "column"), "map": ("row", "cell")}
        if self.kind not in orders or self.order not in orders[self.kind] or self.side < 1:
            raise ValueError(
                f"{self} is not a rule: kind is one of {sorted(orders)} with order "
                f"{' or '.join(map(str, orders.values()))}, and side is at least 1"
            )
        if self.order == "cell" and self.out is None:
            raise ValueError(
                f"{self}: order='cell' needs the grid of cells; set out=(rows, columns)"
            )


class Budget(NamedTuple):
    """Slots of each row: T tokens, P patches, U visual tokens of at most `group` patches each."""

    tokens: int
    patches: int
    visual: int
    group: int = 4

    def check(self):
        """Returns itself; ValueError when a size is impossible."""
        if self.tokens < 1 or self.group < 1 or self.patches < 0 or self.visual < 0:
            raise ValueError(
                f"{self} is not a budget: tokens and group must be at least 1, patches and visual "
                "at least 0 (0 for text-only rows)"
            )
        if bool(self.patches) != bool(self.visual):
            raise ValueError(
                f"{self}: patches and visual must both be positive, or both 0 for text-only rows"
            )
        return self


class Batch(NamedTuple):
    """B packed rows. Arrays are numpy on the host, jax on the device; see the module docstring."""

    tokens: np.ndarray  # i32[B, T]; placeholders keep their id, `source` decides
    positions: np.ndarray  # i32[B, T]
    segments: np.ndarray  # i32[B, T]; 1, 2, ... in order, 0 = padding at the end
    targets: np.ndarray  # i32[B, T]; arbitrary where the weight is 0
    weights: np.ndarray  # f32[B, T]
    source: np.ndarray  # i32[B, T]; index into U, or -1
    patches: np.ndarray  # u8[B, P, C*p*p]; raw pixels, normalised on the device
    patch_segments: np.ndarray  # i32[B, P]; 1, 2, ... in order, 0 = padding at the end
    patch_coords: np.ndarray  # i32[B, P, 2]; row and column in the image
    windows: np.ndarray  # i32[B, U, G]; patch indices of each visual token, -1 = none


def empty_batch(rows, budget, patch_dim):
    """Returns a Batch of padding only, to be filled by the packer or to stand for shapes.

    Args:
      rows: B.
      budget: a `Budget`.
      patch_dim: values in a patch row, C * patch * patch.
    """
    b, (t, p, u, g) = rows, budget.check()
    zeros = np.zeros
    return Batch(
        tokens=zeros((b, t), np.int32),
        positions=zeros((b, t), np.int32),
        segments=zeros((b, t), np.int32),
        targets=zeros((b, t), np.int32),
        weights=zeros((b, t), np.float32),
        source=np.full((b, t), -1, np.int32),
        patches=zeros((b, p, patch_dim), np.uint8),
        patch_segments=zeros((b, p), np.int32),
        patch_coords=zeros((b, p, 2), np.int32),
        windows=np.full((b, u, g), -1, np.int32),
    )
