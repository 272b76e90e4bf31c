"""Drawing what a model is shown: views as their encoder sees them, beside words.

The font is DejaVu Sans, which matplotlib brings: letters of most scripts, but no Chinese, Japanese
or Korean ones, which come out as boxes.
"""

import functools
import math
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageFont

PAPER, INK, FAINT = "white", "black", "#606060"
FONT, LINE, GAP = 13, 18, 4
HEIGHT = 96  # of a picture, at least


def pixels(item):
    """Returns u8[h * p, w * p, 3]: an `Item` as its encoder sees it, pruned parts dimmed."""
    (h, w), merge, patch = item.grid, item.merge, math.isqrt(item.patches.shape[1] // 3)
    rows = item.patches.reshape(-1, merge**2, 3, patch, patch)
    rows = np.where(item.keep[:, None, None, None, None], rows, rows // 4 + 150)
    grid = rows.reshape(h // merge, w // merge, merge, merge, 3, patch, patch)
    return grid.transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * patch, w * patch, 3).astype(np.uint8)


def enlarge(arrays, room):
    """Returns PIL images about `HEIGHT` high that fit side by side, each pixel a square."""
    room -= GAP * len(arrays)
    most = room // max(sum(array.shape[1] for array in arrays), 1)
    images = []
    for array in arrays:
        height, wide = array.shape[:2]
        scale = max(min(round(HEIGHT / height), most), 1)
        size = wide * scale, height * scale
        images.append(Image.fromarray(array).resize(size, Image.Resampling.NEAREST))
    return images


def wrap(text, width):
    """Returns the lines of a text that is broken at spaces to fit a width in pixels."""
    lines, letters = [""], font(FONT)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and letters.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@functools.cache
def font(size):
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size)
