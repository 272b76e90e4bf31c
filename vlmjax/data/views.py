"""What an encoder is shown of a picture: views, each a short list of pixel operations.

Sizes and places are (height, width) and (top, left) in pixels. Operations, applied in order:

    ("resize", (h, w))                        bicubic as Pillow does it: shrinking averages
    ("sample", (h, w))                        bicubic as torch's interpolate does it: shrinking
                                              skips pixels
    ("pad", (h, w), (top, left), colour)      the picture on a canvas of one colour
    ("crop", (top, left, h, w))
"""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import NamedTuple

import numpy as np

from vlmjax.data import bicubic
from vlmjax.data.resize import blank, is_blank

WHOLE = ((1, 1),)  # `Tiling.maps` of one view


class View(NamedTuple):
    """A picture of `size` = (h, w) for one pass of the encoder, and the operations that make it."""

    size: tuple[int, int]
    ops: tuple[tuple, ...]


class Tiling(NamedTuple):
    """The views of a picture.

    Attributes:
      views: in the order in which the encoder sees them.
      grid: (rows, columns) of the tiles, None where the picture is not cut.
      whole: index of the view that shows the whole picture, None if there is none.
      size: (h, w) of the picture.
      maps: (rows, columns) of each group of consecutive views that continue each other: a whole
        view is (1, 1), tiles are their grid. Example, AnyRes with 2x1 tiles: ((1, 1), (2, 1)).
    """

    views: tuple[View, ...]
    grid: tuple[int, int] | None
    whole: int | None
    size: tuple[int, int]
    maps: tuple[tuple[int, int], ...]


def resized(size):
    """Returns the view of the picture squeezed into `size`."""
    return View(tuple(size), (("resize", tuple(size)),))


def padded(width, height, fill):
    """Returns the operations that centre a picture on a square."""
    side = max(width, height)
    if width == height:
        return ()
    return (("pad", (side, side), ((side - height) // 2, (side - width) // 2), fill),)


def cropped(width, height, side, before=()):
    """Returns the view of the middle of a picture whose shorter side was resized to `side`."""
    if width <= height:
        size = (int(side * height / width), side)
    else:
        size = (side, int(side * width / height))
    box = ((size[0] - side) // 2, (size[1] - side) // 2, side, side)
    return View((side, side), (*before, ("resize", size), ("crop", box)))


def cut(canvas, grid, tile):
    """Returns the views that cut a canvas, given as operations, into tiles, row by row."""
    (rows, columns), (h, w) = grid, tile
    if grid == (1, 1):
        return (View(tile, canvas),)
    return tuple(
        View(tile, (*canvas, ("crop", (r * h, c * w, h, w))))
        for r in range(rows)
        for c in range(columns)
    )


def check_settings(settings, **choices):
    """Raises ValueError for an unknown choice or a number below 1 in a settings dataclass."""
    name = type(settings).__name__
    for field, known in choices.items():
        if getattr(settings, field) not in known:
            raise ValueError(
                f"{name}.{field} is {getattr(settings, field)!r}: use one of {sorted(known)}"
            )
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name}.{field.name} is {value}, it must be at least 1: correct it")


def render(image: np.ndarray, tiling: Tiling) -> list[np.ndarray]:
    """Returns u8[h, w, 3] for each view of a picture; what views share is computed once.

    Of a `resize.blank` picture views are blank too.
    """
    image = np.asarray(image)
    if image.shape != (*tiling.size, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"the image is {image.dtype}{list(image.shape)}, its tiling was made for "
            f"uint8{[*tiling.size, 3]}: convert it, or make a tiling of its own size"
        )
    if is_blank(image):
        return [blank(*view.size) for view in tiling.views]
    done = {(): image}
    pixels = []
    for view in tiling.views:
        for n in range(1, len(view.ops) + 1):
            if view.ops[:n] not in done:
                name, *values = view.ops[n - 1]
                done[view.ops[:n]] = OPERATIONS[name](done[view.ops[: n - 1]], *values)
        pixels.append(done[view.ops])
    return pixels


def _sample(image, size):
    rows, columns = (sample_matrix(n, m) for n, m in zip(image.shape, size, strict=False))
    pixels = np.einsum("hi,wj,ijc->hwc", rows, columns, image, optimize=True)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _pad(image, canvas, place, colour):
    (top, left), (height, width, _) = place, image.shape
    padded = np.empty((*canvas, 3), np.uint8)
    padded[:] = colour
    padded[top : top + height, left : left + width] = image
    return padded


def _crop(image, box):
    top, left, height, width = box
    return image[top : top + height, left : left + width]


OPERATIONS = {"resize": bicubic.resize, "sample": _sample, "pad": _pad, "crop": _crop}


@functools.lru_cache(maxsize=64)
def sample_matrix(n: int, m: int) -> np.ndarray:
    """Returns f32[m, n]: torch's bicubic (a = -0.75) from n to m samples, no antialias.

    Output i lies at (i + 0.5) * n / m - 0.5; beyond the edges the outermost sample repeats.
    """
    place = (np.arange(m) + 0.5) * n / m - 0.5
    first = np.floor(place).astype(int)
    matrix = np.zeros((m, n), np.float32)
    for tap in range(-1, 3):
        x = np.abs(place - first - tap)
        near = (1.25 * x - 2.25) * x * x + 1
        far = -0.75 * (((x - 5) * x + 8) * x - 4)
        np.add.at(
            matrix,
            (np.arange(m), np.clip(first + tap, 0, n - 1)),
            np.where(x <= 1, near, np.where(x < 2, far, 0)),
        )
    return matrix
