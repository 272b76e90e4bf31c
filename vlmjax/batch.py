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

from typing import NamedTuple

import numpy as np


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


class Patches(NamedTuple):
    """Packed patches of one encoder: views (images, frames or tiles) one after another in each row.

    The slots in front of a view are those of its class token (k = 0) and registers (k = 1, ...);
    their pixels are arbitrary and their coordinates are (-1 - k, 0).
    """

    pixels: np.ndarray  # u8[B, P, C*p*p] raw, or floating: already normalised; channel-major
    segments: np.ndarray  # i32[B, P]; one number for each view, in order; 0 = padding at the end
    coords: np.ndarray  # f32[B, P, 2]; row and column in the frame of the encoder


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
