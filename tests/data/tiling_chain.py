"""The host's way from a picture to the sequence of its visual tokens, put together once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlmjax.data import units
from vlmjax.data.arrange import Arrangement, arrange
from vlmjax.data.views import Tiling, render


def rule(kind="window", side=1, pad=True, order="row", out=None, prefix=0):
    """Returns what a connector says of its units, with the fields of `batch.UnitRule`."""
    return SimpleNamespace(kind=kind, side=side, pad=pad, order=order, out=out, prefix=prefix)


class Chain(NamedTuple):
    """What each step makes of a picture; patches f32[n, p * p * 3] of all views."""

    tiling: Tiling
    patches: np.ndarray
    units: units.Units
    arrangement: Arrangement


def chain(image, tile, patch, unit, form, *, tokens=1, stitched=False):
    """Returns the `Chain` of an RGB image.

    Args:
      image: a PIL image.
      tile: (width, height) -> Tiling.
      patch: side of a patch.
      unit: of the connector, see `rule`.
      form: a `Format`.
      tokens: that the connector makes of a whole map that has no grid.
      stitched: whether tiles are laid side by side before the connector.
    """
    tiling = tile(image.width, image.height)
    patches = np.concatenate([cut(view, patch) for view in render(image, tiling)])
    maps = units.view_maps([(h // patch, w // patch) for h, w in (v.size for v in tiling.views)])
    if stitched:
        maps = units.stitch_groups(maps, tiling.maps)
    u = units.by_rule(unit, maps, tokens=tokens, size=tiling.size)
    return Chain(tiling, patches, u, arrange(tiling, u.grids, form))


def count(tile, patch, unit, form, size, **options):
    """Returns how many visual entries a picture of this (width, height) takes in the sequence."""
    return len(
        chain(Image.new("RGB", size), tile, patch, unit, form, **options).arrangement.entries
    )


def cut(view, patch):
    """Returns f32[patches, p * p * 3] of u8[h, w, 3], row by row; the rest is left out."""
    h, w = (n // patch for n in view.shape[:2])
    view = view[: h * patch, : w * patch].reshape(h, patch, w, patch, 3)
    return view.swapaxes(1, 2).reshape(h * w, -1).astype(np.float32)


def gradient(width, height):
    """A picture whose red grows to the right and whose green grows downward."""
    x = np.linspace(20, 235, width)[None].repeat(height, 0)
    y = np.linspace(20, 235, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
