"""Where patches lie in the frame of an encoder: f32[h * w, 2], (row, column), row by row.

The arithmetic is the original's float32, since a place can fall on either side of a bucket.
"""

from __future__ import annotations

import functools

import numpy as np


def grid_coords(grid: tuple[int, int], side: int | tuple[int, int] = 0) -> np.ndarray:
    """Returns the whole coordinates 0, 1, ... of a (rows, columns) grid; `side` is not read."""
    return _pairs(*(np.arange(n, dtype=np.float32) for n in grid))


def table_coords(grid: tuple[int, int], side: int | tuple[int, int]) -> np.ndarray:
    """Returns the places in a position table that is resized to the grid.

    They are (i + 0.5) * side / n - 0.5 as in torch's interpolate with align_corners=False; whole
    numbers where the grid is as large as the table.

    Args:
      grid: (rows, columns) of patches.
      side: of the square table, or its (rows, columns).
    """
    sides = (side, side) if isinstance(side, int) else side
    return _pairs(*map(_table_axis, grid, sides))


def bucket_coords(
    grid: tuple[int, int], side: int | tuple[int, int], arithmetic: str = "original"
) -> np.ndarray:
    """Returns the buckets of the patches in a position table of fractional places (NaViT).

    Args:
      grid: (rows, columns) of patches.
      side: as in `table_coords`; 70 for MiniCPM-Llama3-V 2.5.
      arithmetic: "original" (MiniCPM) or "transformers" (Idefics2); at 70 they differ where an axis
        has 49 or 58 patches.
    """
    sides = (side, side) if isinstance(side, int) else side
    return _pairs(*(buckets(n, m, arithmetic) for n, m in zip(grid, sides, strict=True)))


COORDS = {"grid": grid_coords, "table": table_coords, "bucket": bucket_coords}


def _pairs(rows, columns):
    grid = np.meshgrid(rows, columns, indexing="ij")
    return np.stack(grid, -1).reshape(-1, 2).astype(np.float32)


@functools.lru_cache(maxsize=512)
def _table_axis(n, side):
    scale = np.float32(side) / np.float32(n)
    return (np.arange(n, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)


@functools.lru_cache(maxsize=512)
def buckets(n: int, side: int, arithmetic: str = "original") -> np.ndarray:
    """Returns i32[n]: how many of the boundaries j / side lie at or below i / n, for i < n.

    More patches than the table has places share them, as in an elongated picture.
    """
    if arithmetic not in ("original", "transformers"):
        raise ValueError(f"arithmetic is {arithmetic!r}: use 'original' or 'transformers'")
    step = np.float32(1) / np.float32(n)
    if arithmetic == "original":
        # torch's arange makes full blocks of eight from a start that is rounded to float32; the
        # rest one by one. Two axes, of 49 and 58 patches, show it.
        number, step = np.arange(n), np.float64(step)
        start = np.where(number < n // 8 * 8, number // 8 * 8, number)
        rounded = (start * step).astype(np.float32)
        places = (rounded + (number - start) * step).astype(np.float32)
    else:
        places = np.minimum(np.arange(n, dtype=np.float32) * step, np.float32(1 - 1e-6))
    boundaries = (1 / side + np.arange(side - 1) * (1 / side)).astype(np.float32)
    return np.searchsorted(boundaries, places, side="right").astype(np.int32)
