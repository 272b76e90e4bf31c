"""Bicubic resizing: the pixels are those of Pillow 13, whatever is installed."""

import numpy as np
import PIL
import pytest
from PIL import Image

from vlmjax.data import bicubic

SIZES = [  # (h, w) from and to: both shrink, both grow, one of each, neither, far, from one pixel
    ((108, 192), (70, 126)),
    ((30, 44), (70, 126)),
    ((64, 96), (63, 98)),
    ((64, 96), (70, 84)),
    ((64, 96), (64, 96)),
    ((64, 96), (64, 42)),
    ((64, 96), (42, 96)),
    ((3, 900), (14, 28)),
    ((700, 5), (3, 5)),
    ((1, 1), (28, 14)),
    ((33, 1), (1, 33)),
]


def by_pillow(pixels, size):
    """One axis at a time, in the order of Pillow 13."""
    (h, w), (height, width) = pixels.shape[:2], size
    rows_first = height < h and h - height > 2 * (w - width)
    between = (w, height) if rows_first else (width, h)
    image = Image.fromarray(pixels).resize(between, Image.Resampling.BICUBIC)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("before, after", SIZES)
@pytest.mark.parametrize("kind", ["noise", "black and white"])  # the second overshoots everywhere
def test_pixels_are_those_of_pillow(before, after, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (*before, 3), dtype=np.uint8)
    if kind != "noise":
        pixels = np.where(pixels < 128, np.uint8(0), np.uint8(255))
    np.testing.assert_array_equal(bicubic.resize(pixels, after), by_pillow(pixels, after))


def test_pixels_are_those_of_pillow_at_drawn_sizes():
    rng, newest = np.random.default_rng(1), int(PIL.__version__.split(".")[0]) >= 13
    for sizes in rng.integers(1, 120, (200, 4)).tolist():
        before, after = sizes[:2], sizes[2:]
        pixels = rng.integers(0, 256, (*before, 3), dtype=np.uint8)
        found = bicubic.resize(pixels, after)
        np.testing.assert_array_equal(found, by_pillow(pixels, after))
        if newest:
            whole = Image.fromarray(pixels).resize(after[::-1], Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(found, np.asarray(whole))


def test_without_the_compiler_the_pixels_are_the_same(monkeypatch):
    rng = np.random.default_rng(3)
    for before, after in SIZES:
        pixels = rng.integers(0, 256, (*before, 3), dtype=np.uint8)
        found = bicubic.resize(pixels, after)
        with monkeypatch.context() as patch:
            patch.setattr(bicubic, "numba", None)
            np.testing.assert_array_equal(bicubic.resize(pixels, after), found)


def test_views_and_read_only_pixels_resize_too():
    pixels = np.random.default_rng(2).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    turned = np.rot90(pixels)
    np.testing.assert_array_equal(
        bicubic.resize(turned, (30, 20)), by_pillow(np.ascontiguousarray(turned), (30, 20))
    )
    pixels.flags.writeable = False
    np.testing.assert_array_equal(bicubic.resize(pixels, (30, 20)), by_pillow(pixels, (30, 20)))
