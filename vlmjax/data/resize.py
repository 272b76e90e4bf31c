"""Native-resolution resize rules and the cut into patch rows.

A clip is one image (1 frame) or one video (its frames share one size); sizes are (height, width)
in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmjax.data import bicubic


class Clip(NamedTuple):
    """An image or a video before resizing."""

    height: int
    width: int
    frames: int
    merge: int


def resize_videollama3(
    clips: Sequence[Clip], *, patch: int, min_tokens: int, max_tokens: int
) -> list[tuple[int, int]]:
    """Returns the resized (height, width) of each clip by the original VideoLLaMA3 rule.

    All images and frames of the sample share `max_tokens` visual tokens evenly. Where merge sizes
    differ inside one sample, every clip is scaled by one common factor instead, and there is no
    minimum: a side may come out as 0, which the caller must refuse.
    """
    if len({clip.merge for clip in clips}) > 1:
        return _resize_mixed(clips, patch, max_tokens)
    frames = sum(clip.frames for clip in clips)
    sizes = []
    for height, width, _, merge in clips:
        factor = patch * merge
        limit = max_tokens * factor**2 // frames
        new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
        if new_h * new_w > limit:
            beta = math.sqrt(height * width / limit)
            new_h, new_w = (math.floor(side / beta / factor) * factor for side in (height, width))
        if new_h * new_w < min_tokens * factor**2:
            beta = math.sqrt(min_tokens * factor**2 / (height * width))
            new_h, new_w = (math.ceil(side * beta / factor) * factor for side in (height, width))
        sizes.append((new_h, new_w))
    return sizes


def _resize_mixed(clips, patch, max_tokens):
    total = sum(
        c.frames * math.ceil(c.height / (patch * c.merge)) * math.ceil(c.width / (patch * c.merge))
        for c in clips
    )
    beta, fit = (math.sqrt(total / max_tokens), math.floor) if total > max_tokens else (1.0, round)
    return [
        tuple(
            fit(side / beta / (patch * c.merge)) * patch * c.merge for side in (c.height, c.width)
        )
        for c in clips
    ]


def resize_transformers(
    clips: Sequence[Clip], *, patch: int, min_tokens: int, max_tokens: int
) -> list[tuple[int, int]]:
    """Returns the (height, width) of each clip by transformers' `smart_resize`, a budget each."""
    sizes = []
    for height, width, frames, merge in clips:
        factor = patch * merge
        limit = max_tokens * factor**2 // frames
        new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
        if new_h * new_w > limit:
            beta = math.sqrt(height * width / limit)
            new_h, new_w = (
                max(factor, math.floor(side / beta / factor) * factor) for side in (height, width)
            )
        elif new_h * new_w < min_tokens * factor**2:
            beta = math.sqrt(min_tokens * factor**2 / (height * width))
            new_h, new_w = (math.ceil(side * beta / factor) * factor for side in (height, width))
        sizes.append((new_h, new_w))
    return sizes


RULES = {"videollama3": resize_videollama3, "transformers": resize_transformers}


def patch_rows(pixels: np.ndarray, size: tuple[int, int], patch: int, merge: int) -> np.ndarray:
    """Returns u8[patches, 3 * patch * patch] of u8[h, w, 3] pixels resized (bicubic) to `size`.

    Rows are merge-window-major, each row is channel-major (C, ph, pw).
    """
    height, width = size
    windows = (height // (patch * merge), merge, patch, width // (patch * merge), merge, patch, 3)
    pixels = bicubic.resize(pixels, size).reshape(windows)
    return pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * patch * patch)


def blank(height: int, width: int) -> np.ndarray:
    """Returns u8[height, width, 3] that take no memory, where only the size of pixels matters."""
    return np.broadcast_to(np.uint8(0), (height, width, 3))


def is_blank(pixels: np.ndarray) -> bool:
    """Returns whether an array was made by `blank` or cut from such."""
    return not any(pixels.strides)


def blank_rows(size: tuple[int, int], patch: int) -> np.ndarray:
    """Returns what `patch_rows` would but for the pixels, which take no memory."""
    rows = size[0] // patch * (size[1] // patch)
    return np.broadcast_to(np.uint8(0), (rows, 3 * patch * patch))
