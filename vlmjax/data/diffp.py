"""DiffFP, the difference-based frame-token pruner of VideoLLaMA3 (arXiv 2501.13106), on the host.

A visual token of a frame is kept when its window of pixels changed since the previous frame:
255 * mean|x_t - x_(t-1)| > threshold with x normalised to [-1, 1]. On 8-bit pixels that is exactly
2 * sum|difference| / values, so it is computed from integers: no rounding but the last division in
f32.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def score(sums, values):
    """Returns f32: the change of windows of `values` 8-bit values that differ by `sums` in all."""
    return 2 * sums.astype(np.float32) / values


def change_scores(previous: np.ndarray, current: np.ndarray, merge: int) -> np.ndarray:
    """Returns f32[windows], how much each window changed between two frames u8[patches, values]."""
    if previous.shape != current.shape:
        raise ValueError(
            f"frames have {previous.shape[0]} and {current.shape[0]} patches: resize all frames "
            "of a video to one size"
        )
    difference = np.maximum(previous, current) - np.minimum(previous, current)
    windows = difference.reshape(len(difference) // merge**2, -1)
    return score(windows.sum(-1, dtype=np.uint32), windows.shape[1])


def next_mask(
    previous: np.ndarray | None,
    current: np.ndarray,
    merge: int,
    threshold: float = 0.1,
    min_kept: int = 1,
) -> np.ndarray:
    """Returns the keep mask bool[windows] of one frame; `previous` is None for the first frame,
    kept whole.

    A frame that keeps fewer than `min_kept` windows also keeps its first `min_kept` ones (top
    left).
    """
    if previous is None:
        return np.ones(len(current) // merge**2, bool)
    keep = change_scores(previous, current, merge) > np.float32(threshold)
    if np.count_nonzero(keep) < min_kept:
        keep[:min_kept] = True
    return keep


def keep_masks(
    frames: Iterable[np.ndarray], merge: int, threshold: float = 0.1, min_kept: int = 1
) -> list[np.ndarray]:
    """Returns the keep mask bool[windows] of every frame of a video, each u8[patches, values]."""
    masks, previous = [], None
    for current in frames:
        masks.append(next_mask(previous, current, merge, threshold, min_kept))
        previous = current
    return masks
