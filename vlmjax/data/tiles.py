"""Strategies that choose a grid of tiles by the picture: InternVL 1.5 and LLaVA-UHD / MiniCPM-V.

Papers: arXiv:2404.16821, arXiv:2403.11703.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from vlmjax.data.image import MAX_ASPECT
from vlmjax.data.views import WHOLE, Tiling, check_settings, cut, resized


@dataclass(frozen=True)
class Dynamic:
    """Tiles in the grid nearest in aspect, then the whole picture (InternVL 1.5).

    Attributes:
      side: of a view.
      min_tiles, max_tiles: bounds on their number, the whole view not counted.
      whole: "last" (only where there are several tiles) or "none".
    """

    side: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    whole: str = "last"

    def __post_init__(self):
        check_settings(self, whole=("last", "none"))
        if self.min_tiles > self.max_tiles:
            raise ValueError(
                f"Dynamic.min_tiles is {self.min_tiles}, above max_tiles = {self.max_tiles}: "
                "lower it"
            )


@functools.lru_cache(maxsize=16)
def _ratios(least, most):
    """(columns, rows) of all grids, those with fewer tiles first."""
    sides = range(1, most + 1)
    return sorted(
        ((i, j) for i in sides for j in range(1, most // i + 1) if least <= i * j),
        key=lambda grid: grid[0] * grid[1],
    )


def dynamic(width: int, height: int, s: Dynamic) -> Tiling:
    """Returns the tiles of the squeezed picture, then the whole view.

    Of grids with the same aspect the picture takes the largest that it fills by more than half.
    """
    best, smallest = (1, 1), math.inf
    for i, j in _ratios(s.min_tiles, s.max_tiles):
        difference = abs(width / height - i / j)
        if difference < smallest or (
            difference == smallest and width * height > 0.5 * s.side**2 * i * j
        ):
            best, smallest = (i, j), difference
    grid, tile = (best[1], best[0]), (s.side, s.side)
    views = cut((("resize", (grid[0] * s.side, grid[1] * s.side)),), grid, tile)
    if len(views) == 1:
        return Tiling(views, grid, 0, (height, width), WHOLE)
    if s.whole == "none":
        return Tiling(views, grid, None, (height, width), (grid,))
    views = (*views, resized(tile))
    return Tiling(views, grid, len(views) - 1, (height, width), (grid, (1, 1)))


@dataclass(frozen=True)
class Uhd:
    """The whole picture, then slices of it, each near its own aspect (LLaVA-UHD, MiniCPM-V).

    Attributes:
      side: a view has about side * side pixels.
      patch: its sides are multiples of it.
      max_slices: most of them.
      rounding: of sides to patches, "round" (MiniCPM-V; halves go to the even neighbour) or "floor"
        (LLaVA-UHD).
    """

    side: int = 448
    patch: int = 14
    max_slices: int = 9
    rounding: str = "round"

    def __post_init__(self):
        check_settings(self, rounding=("round", "floor"))

    @property
    def most_patches(self):
        """The most patches of a view: rounding adds up to half a row and half a column."""
        whole = (self.side // self.patch) ** 2
        longest, shortest = (whole * MAX_ASPECT) ** 0.5, (whole / MAX_ASPECT) ** 0.5
        return math.ceil(whole + (longest + shortest) / 2 + 1)


def uhd(width: int, height: int, s: Uhd) -> Tiling:
    """Returns the whole view, then the slices if the picture has more than side * side pixels."""
    size, most = (height, width), min(math.ceil(width * height / s.side**2), s.max_slices)
    if most <= 1:
        return Tiling((resized(_uhd_size(width, height, s, True)),), None, 0, size, WHOLE)
    counts = [n for n in (most - 1, most, most + 1) if n != 1 and n <= s.max_slices]
    grids = [(n // m, m) for n in counts for m in range(1, n + 1) if n % m == 0]
    wanted = math.log(width / height)
    grid = min(grids, key=lambda g: abs(wanted - math.log(g[1] / g[0])))  # the first of equals
    rows, columns = grid
    slice_w = _multiple(width, columns, s.rounding) / columns
    slice_h = _multiple(height, rows, s.rounding) / rows
    tile = _uhd_size(slice_w, slice_h, s, True)
    tiles = cut((("resize", (tile[0] * rows, tile[1] * columns)),), grid, tile)
    whole = resized(_uhd_size(width, height, s, False))
    return Tiling((whole, *tiles), grid, 0, size, ((1, 1), grid))


def _multiple(length, unit, rounding):
    times = round(length / unit) if rounding == "round" else math.floor(length / unit)
    return max(times * unit, unit)


def _uhd_size(width, height, s, enlarge):
    if enlarge or width * height > s.side**2:
        ratio = width / height
        height = int(s.side / math.sqrt(ratio))
        width = int(height * ratio)
    return _multiple(height, s.patch, s.rounding), _multiple(width, s.patch, s.rounding)
