"""Units: which patches a connector maps at once, and with which weights. Made on the host.

A map is an i32[h, w] of patch indices; -1 is a place without a patch. The patches of an image are
numbered view after view, row by row inside a view; class and register tokens are counted in front
of the patches of their view, so that the numbers are the image's slots in the encoder's buffer.

    maps = view_maps([(24, 24)] * 5)          # five views of 24x24 patches
    windows(maps[0], 2)                       # space-to-depth: 144 units of 4
    whole(stitch(maps[:4], (2, 2)))           # one unit: the 48x48 map of four tiles
    join(area(m, (12, 12)) for m in maps)     # adaptive average pooling of each view
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vlmjax.data.anyres import unpad


class Units(NamedTuple):
    """U units of at most G patches; a size or grid is (rows, columns).

    Attributes:
      index: i32[U, G], -1 = no patch.
      weights: f32[U, G] of the patches in the unit's feature, 0 where there is none; None where the
        connector itself says what becomes of them.
      sizes: i32[U, 2], the rectangle that the patches of a unit form, row by row.
      grids: of the tokens of each map, where a unit becomes one token: their product sums to U.
      mask: bool[U, G], patches that attention may see; None = all that there are.
    """

    index: np.ndarray
    weights: np.ndarray | None
    sizes: np.ndarray
    grids: tuple[tuple[int, int], ...]
    mask: np.ndarray | None = None


def view_maps(grids: Iterable[tuple[int, int]], prefix: int = 0) -> list[np.ndarray]:
    """Returns i32[h, w] for each (h, w): consecutive numbers, view after view.

    `prefix` numbers in front of each view are those of its class and register tokens.
    """
    maps, start = [], 0
    for h, w in grids:
        start += prefix
        maps.append(np.arange(start, start + h * w, dtype=np.int32).reshape(h, w))
        start += h * w
    return maps


def stitch(maps: Sequence[np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """Returns the one map of equal tiles that lie in (rows, columns), given row by row."""
    rows, columns = grid
    return np.block([list(maps[r * columns : (r + 1) * columns]) for r in range(rows)])


def stitch_groups(
    maps: Sequence[np.ndarray], groups: Iterable[tuple[int, int]]
) -> list[np.ndarray]:
    """Returns one map for each group of consecutive views, see `Tiling.maps`."""
    stitched, start = [], 0
    for rows, columns in groups:
        stitched.append(stitch(maps[start : start + rows * columns], (rows, columns)))
        start += rows * columns
    return stitched


def join(parts: Iterable[Units]) -> Units:
    """Returns the units of several maps as one, padded to the largest of them."""
    parts = list(parts)
    most = max(part.index.shape[1] for part in parts)

    def fill(values, empty):
        return np.pad(values, ((0, 0), (0, most - values.shape[1])), constant_values=empty)

    def gather(field, empty):
        values = [getattr(part, field) for part in parts]
        if any(v is None for v in values):
            assert all(v is None for v in values), f"only some units have {field}"
            return None
        return np.concatenate([fill(v, empty) for v in values])

    return Units(
        gather("index", -1),
        gather("weights", 0),
        np.concatenate([part.sizes for part in parts]),
        sum((part.grids for part in parts), ()),
        gather("mask", False),
    )


def _units(index, weights, size, grid):
    sizes = np.tile(np.array([size], np.int32), (len(index), 1))
    return Units(index.astype(np.int32), weights, sizes, (grid,))


def single(patches: np.ndarray) -> Units:
    """Returns a unit for each patch of a map, in its order."""
    return _units(patches.reshape(-1, 1), None, (1, 1), patches.shape)


def unpooled(tokens: np.ndarray, weighted: bool = True) -> Units:
    """Returns units that leave a map as it is among pooled ones, with weights or without."""
    units = single(tokens)
    return units._replace(weights=np.ones(units.index.shape, np.float32) if weighted else None)


def shifted(units: Units, by: int) -> Units:
    """Returns the units of an image whose patches are counted from `by`."""
    return units._replace(index=np.where(units.index >= 0, units.index + by, units.index))


def whole(patches: np.ndarray, out: tuple[int, int] = (1, 1), prefix: int = 0) -> Units:
    """Returns the map as one unit.

    Args:
      patches: i32[h, w].
      out: (rows, columns) of the tokens that the connector makes of it.
      prefix: how many class and register tokens come before the patches; the map is then one view.
    """
    index = patches.reshape(1, -1)
    before = patches[0, 0] - np.arange(prefix, 0, -1)
    index = np.concatenate([before[None], index], 1) if prefix else index
    return _units(index, None, patches.shape, out)


PADDINGS = ("zero", "floor")
ORDERS = ("row", "column")


def windows(patches: np.ndarray, side: int, padding: str = "zero", order: str = "row") -> Units:
    """Returns a unit for each side x side window of a map, its patches row by row.

    Args:
      patches: i32[h, w].
      side: of a window.
      padding: what happens to the rest where `side` does not divide the map: "zero" fills the
        last windows with -1 (right and below), "floor" drops it.
      order: of the windows, "row" after row or "column" after column; the latter is the token
        order of InternVL's first pixel shuffle (ps_version v1).
    """
    if padding not in PADDINGS or order not in ORDERS:
        raise ValueError(
            f"padding {padding!r} and order {order!r}: use one of {PADDINGS} and of {ORDERS}"
        )
    h, w = patches.shape
    if padding == "zero":
        patches = np.pad(patches, ((0, -h % side), (0, -w % side)), constant_values=-1)
    rows, columns = (n // side for n in patches.shape)
    patches = patches[: rows * side, : columns * side]
    index = patches.reshape(rows, side, columns, side).transpose(0, 2, 1, 3)
    grid = (rows, columns)
    if order == "column":
        index, grid = index.swapaxes(0, 1), (columns, rows)
    return _units(index.reshape(-1, side * side), None, (side, side), grid)


def _taps(patches, rows, columns):
    """Units from (index, weight) tables [outputs, taps] of each axis; zero weights are no patch."""
    (ri, rw), (ci, cw) = rows, columns
    index = patches[ri[:, None, :, None], ci[None, :, None, :]]
    weights = (rw[:, None, :, None] * cw[None, :, None, :]).astype(np.float32)
    grid, size = index.shape[:2], index.shape[2:]
    index = np.where((weights != 0) & (index >= 0), index, -1).reshape(grid[0] * grid[1], -1)
    weights = weights.reshape(index.shape)
    return _units(index, np.where(index >= 0, weights, np.float32(0)), size, grid)


@functools.lru_cache(maxsize=512)
def _bilinear_axis(n, m):
    place = np.maximum((np.arange(m) + 0.5) * n / m - 0.5, 0)
    low = place.astype(int)
    share = place - low
    return np.stack([low, np.minimum(low + 1, n - 1)], 1), np.stack([1 - share, share], 1)


def bilinear(patches: np.ndarray, size: tuple[int, int]) -> Units:
    """Returns units that resize a map to (rows, columns) as torch's bilinear interpolate does.

    align_corners=False, no antialias: a unit has at most 2x2 patches, also where the map shrinks.
    """
    axes = [_bilinear_axis(n, m) for n, m in zip(patches.shape, size, strict=True)]
    return _taps(patches, *axes)


@functools.lru_cache(maxsize=512)
def _area_axis(n, m):
    start = np.arange(m) * n // m
    length = -(-np.arange(1, m + 1) * n // m) - start
    taps = np.arange(length.max())
    weight = (taps < length[:, None]) / length[:, None]
    return np.minimum(start[:, None] + taps, n - 1), weight


def area(patches: np.ndarray, size: tuple[int, int]) -> Units:
    """Returns units of torch's adaptive average pooling to (rows, columns).

    Output i of m averages inputs floor(i n / m) up to ceil((i + 1) n / m) of n.
    """
    axes = [_area_axis(n, m) for n, m in zip(patches.shape, size, strict=True)]
    return _taps(patches, *axes)


def average(patches: np.ndarray, stride: int) -> Units:
    """Returns units of average pooling with windows and steps of `stride`; the rest is dropped."""
    units = windows(patches, stride, "floor")
    return units._replace(weights=np.full(units.index.shape, 1 / stride**2, np.float32))


def maximum(patches: np.ndarray, stride: int) -> Units:
    """Returns units of max pooling; no weights, the largest value of each channel is taken."""
    return windows(patches, stride, "floor")


def ceil_bilinear(patches: np.ndarray, stride: int) -> Units:
    """Returns units that shrink a map bilinearly to 1 / stride of its sides, rounded up."""
    h, w = patches.shape
    return bilinear(patches, (-(-h // stride), -(-w // stride)))


POOLS = {"average": average, "max": maximum, "bilinear": ceil_bilinear}


def query_major(patches: np.ndarray, side: int) -> np.ndarray:
    """Returns i32[side * side, w * w]: the window of each query of a side x side grid.

    `patches` is a (side * w, side * w) map, or an array whose first two axes are one.
    """
    h, w = patches.shape[:2]
    if h % side or w % side:
        raise ValueError(
            f"a map of {h}x{w} has no equal windows for {side}x{side} queries: resize the "
            f"encoder's features to a multiple of {side} (Cambrian resizes 27x27 to 24x24)"
        )
    cut = patches.reshape(side, h // side, side, w // side, *patches.shape[2:]).swapaxes(1, 2)
    return cut.reshape(side * side, (h // side) * (w // side), *patches.shape[2:])


def sva(
    maps: Sequence[np.ndarray], side: int, size: tuple[int, int], rounding: str = "original"
) -> list[Units]:
    """Returns one unit for each tower: what the queries of Cambrian's SVA may see.

    Args:
      maps: for each tower the i32 map of its features over a picture padded to a square.
      side: of the grid of queries.
      size: (h, w) of the picture before it was padded.
      rounding: of the padding, see `anyres.unpad`.

    Returns:
      Units of one row each: features in the order of queries, then of the places in their window.
      The mask hides padding; a query whose window is all padding sees all of it.
    """
    towers = []
    for patches in maps:
        top, left, rows, columns = unpad(patches.shape, size, rounding)
        seen = np.zeros(patches.shape, bool)
        seen[top : top + rows, left : left + columns] = True
        seen = query_major(seen, side)
        seen |= ~seen.any(1, keepdims=True)
        index = query_major(patches, side).reshape(1, -1)
        units = _units(index, None, patches.shape, (side, side))
        towers.append(units._replace(mask=seen.reshape(1, -1)))
    return towers


def coded(units: Units) -> np.ndarray:
    """Returns i32[U, G]: the index, with -2 - i where the mask hides patch i from attention."""
    if units.mask is None:
        return units.index
    return np.where(units.mask | (units.index < 0), units.index, -2 - units.index)


def by_rule(
    rule, maps: Sequence[np.ndarray], *, tokens: int = 1, size: tuple[int, int] | None = None
) -> Units:
    """Returns the units that a connector wants of the maps of an image.

    Args:
      rule: a `batch.UnitRule`.
      maps: i32[h, w] each.
      tokens: that the connector makes of a map, where they form no grid.
      size: (h, w) of a picture that was padded to a square, for `sva`.
    """
    if rule.kind == "window":
        padding = "zero" if rule.pad else "floor"
        return join(windows(m, rule.side, padding, rule.order) for m in maps)
    if rule.order == "cell":
        rows, columns = rule.out
        if rows != columns or size is None:
            raise ValueError(
                f"{rule} with a picture of size {size}: order='cell' needs a square `out` and the "
                "(h, w) of the picture"
            )
        return join(sva(maps, rows, size))
    return join(whole(m, rule.out or (1, tokens), rule.prefix) for m in maps)
