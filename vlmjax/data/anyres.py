"""AnyRes (LLaVA-NeXT): the strategy, and its arithmetic: canvas, fit, unpadding, cap on tokens.

Two implementations are in the world and disagree on a few sizes, so both are here by name. They
read a pinpoint as (width, height), "original", or as (height, width), "transformers": where two
canvases are equally good the first of the list wins, and the readings order them differently. And
they round the unpadded side as int(x), "original", or int(round(x, 7)), "transformers".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmjax.data.views import Tiling, check_settings, cut, resized

READINGS = ("original", "transformers")


def select_canvas(
    width: int, height: int, pinpoints: Sequence[tuple[int, int]], reading: str = "original"
) -> tuple[int, int]:
    """Returns the (h, w) of the canvas that keeps most of the picture, then wastes least."""
    canvases = [(h, w) if reading == "transformers" else (w, h) for h, w in pinpoints]

    def score(canvas):
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=score)  # the first of equals


def fit(width: int, height: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """Returns the (h, w) of the picture resized to touch the canvas, its aspect kept."""
    canvas_h, canvas_w = canvas
    if canvas_w / width < canvas_h / height:
        return min(math.ceil(height * (canvas_w / width)), canvas_h), canvas_w
    return canvas_h, min(math.ceil(width * (canvas_h / height)), canvas_w)


def unpad(
    grid: tuple[int, int], size: tuple[int, int], rounding: str = "original"
) -> tuple[int, int, int, int]:
    """Returns (top, left, rows, columns) of what is not padding in a map of (rows, columns).

    `size` is the (h, w) of the picture that was centred on the map. The same number of lines goes
    at both ends, so one line of padding may stay.
    """
    rows, columns = grid
    height, width = size
    whole = int if rounding == "original" else lambda x: int(round(x, 7))
    if width / height > columns / rows:
        top = (rows - whole(height * (columns / width))) // 2
        return top, 0, rows - 2 * top, columns
    left = (columns - whole(width * (rows / height))) // 2
    return 0, left, rows, columns - 2 * left


def cap(grid: tuple[int, int], most: int, side: int) -> tuple[int, int]:
    """Returns the (rows, columns) left by anyres_max_N: N = `most` tiles of side x side tokens.

    A map less than a tenth too long in its sides stays.
    """
    rows, columns = grid
    times = math.sqrt(rows * columns / (most * side**2))
    return (int(rows // times), int(columns // times)) if times > 1.1 else grid


@dataclass(frozen=True)
class AnyRes:
    """The whole picture squeezed into a view, then tiles of it on the best canvas (LLaVA-NeXT).

    The same tiling serves anyres_max_N, whose cap is on tokens: see `data.arrange`.

    Attributes:
      side: of a view.
      pinpoints: sizes of the canvases, multiples of `side`. Order decides between equals.
      reading: of the pinpoints, "original" = (width, height) or "transformers" = (height, width).
      fill: colour of the canvas around the picture.
    """

    side: int = 336
    pinpoints: tuple[tuple[int, int], ...] = (
        (336, 672),
        (672, 336),
        (672, 672),
        (1008, 336),
        (336, 1008),
    )
    reading: str = "original"
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        check_settings(self, reading=READINGS)
        bad = [p for p in self.pinpoints if any(x % self.side or x < 1 for x in p)]
        if bad or not self.pinpoints:
            raise ValueError(
                f"AnyRes.pinpoints is {self.pinpoints}: give at least one canvas, with sides that "
                f"are multiples of side = {self.side}"
            )


def anyres(width: int, height: int, s: AnyRes) -> Tiling:
    """Returns the whole view, then the tiles."""
    canvas = select_canvas(width, height, s.pinpoints, s.reading)
    size = fit(width, height, canvas)
    place = ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2)
    tile, grid = (s.side, s.side), (canvas[0] // s.side, canvas[1] // s.side)
    tiles = cut((("resize", size), ("pad", canvas, place, s.fill)), grid, tile)
    return Tiling((resized(tile), *tiles), grid, 0, (height, width), ((1, 1), grid))
