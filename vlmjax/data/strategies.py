"""Resolution strategies: which views of a picture of some size an encoder sees.

    tiling = strategy("anyres", side=336, pinpoints=((336, 672), (672, 336), (672, 672)))(640, 480)
    views = render(image, tiling)        # u8[336, 336, 3] each

A strategy is a pure function of (width, height) and its frozen settings. Adding one: a settings
class, a function, a line in STRATEGIES.

Papers: LLaVA-1.5 arXiv:2310.03744, LLaVA-NeXT (AnyRes) llava-vl.github.io, InternVL 1.5
arXiv:2404.16821, LLaVA-UHD arXiv:2403.11703, S2 arXiv:2403.13043.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from vlmjax.data.anyres import AnyRes, anyres
from vlmjax.data.resize import RULES, Clip
from vlmjax.data.tiles import Dynamic, Uhd, dynamic, uhd
from vlmjax.data.views import WHOLE, Tiling, View, check_settings, cropped, cut, padded, resized

CLIP_MEAN_COLOUR = (122, 116, 104)  # int(mean * 255)


@dataclass(frozen=True)
class Native:
    """One view in nearly its own size and aspect, by a rule of `data.resize` for one image alone.

    Where the images of a sample share a budget, the processor calls the rule itself.
    """

    rule: str = "videollama3"
    patch: int = 14
    merge: int = 1
    min_tokens: int = 16
    max_tokens: int = 16384

    def __post_init__(self):
        check_settings(self, rule=RULES)


def native(width: int, height: int, s: Native) -> Tiling:
    """Returns one view whose sides are multiples of patch * merge."""
    limits = dict(patch=s.patch, min_tokens=s.min_tokens, max_tokens=s.max_tokens)
    (size,) = RULES[s.rule]([Clip(height, width, 1, s.merge)], **limits)
    return Tiling((resized(size),), None, 0, (height, width), WHOLE)


@dataclass(frozen=True)
class Square:
    """One square view.

    Attributes:
      side: of the view.
      mode: "pad" (centred on a square of the fill colour, then resized), "resize" (the aspect is
        ignored) or "crop" (the shorter side fits, the middle is cut out, as CLIP does it).
      fill: colour around a padded picture, int(mean * 255) of the encoder's mean.
    """

    side: int = 336
    mode: str = "pad"
    fill: tuple[int, int, int] = CLIP_MEAN_COLOUR

    def __post_init__(self):
        check_settings(self, mode=("pad", "resize", "crop"))


def square(width: int, height: int, s: Square) -> Tiling:
    """Returns one side x side view."""
    size = (s.side, s.side)
    if s.mode == "pad":
        view = View(size, (*padded(width, height, s.fill), ("resize", size)))
    elif s.mode == "resize":
        view = resized(size)
    else:
        view = cropped(width, height, s.side)
    return Tiling((view,), None, 0, (height, width), WHOLE)


@dataclass(frozen=True)
class Grid2x2:
    """2x2 tiles, then the whole picture (360VL).

    Attributes:
      side: of a view.
      pad: "none" or "square": centre the picture on a square of the fill colour first.
      fill: as in `Square`.
      whole: what the last view is cut from by CLIP's crop: "picture" (the middle of an elongated
        one), or "canvas", the picture already squeezed into 2 * side squared, which the released
        inference code uses (so that nothing is cut off).
    """

    side: int = 336
    pad: str = "none"
    fill: tuple[int, int, int] = CLIP_MEAN_COLOUR
    whole: str = "picture"

    def __post_init__(self):
        check_settings(self, pad=("none", "square"), whole=("picture", "canvas"))


def grid2x2(width: int, height: int, s: Grid2x2) -> Tiling:
    """Returns the views top left, top right, bottom left, bottom right, whole."""
    before, size = (), (height, width)
    if s.pad == "square":
        before, size = padded(width, height, s.fill), (max(size), max(size))
    canvas = (*before, ("resize", (2 * s.side, 2 * s.side)))
    if s.whole == "canvas":
        whole = View((s.side, s.side), (*canvas, ("resize", (s.side, s.side))))
    else:
        whole = cropped(size[1], size[0], s.side, before)
    views = (*cut(canvas, (2, 2), (s.side, s.side)), whole)
    return Tiling(views, (2, 2), 4, (height, width), ((2, 2), (1, 1)))


@dataclass(frozen=True)
class S2:
    """The picture at several scales, each cut into tiles of the encoder's size (S2, VILA-1.5).

    Attributes:
      side: of a view.
      scales: sides of the square pictures, multiples of `side`, smallest first.
      smaller: how the smaller ones are made, "picture" (from the picture, averaging) or "sample"
        (as the original does: from the largest, skipping pixels).
    """

    side: int = 384
    scales: tuple[int, ...] = (384, 768)
    smaller: str = "sample"

    def __post_init__(self):
        check_settings(self, smaller=("picture", "sample"))
        bad = [x for x in self.scales if x < self.side or x % self.side]
        if bad or not self.scales or list(self.scales) != sorted(self.scales):
            raise ValueError(
                f"S2.scales is {self.scales}: give multiples of side = {self.side} in rising order"
            )


def s2(width: int, height: int, s: S2) -> Tiling:
    """Returns the tiles of each scale, smallest scale first; the aspect is ignored."""
    views, maps, largest = [], [], s.scales[-1]
    for scale in s.scales:
        if scale == largest or s.smaller == "picture":
            ops = (("resize", (scale, scale)),)
        else:
            ops = (("resize", (largest, largest)), ("sample", (scale, scale)))
        maps.append((scale // s.side, scale // s.side))
        views += cut(ops, maps[-1], (s.side, s.side))
    whole = maps.index((1, 1)) if (1, 1) in maps else None
    return Tiling(tuple(views), maps[-1], whole, (height, width), tuple(maps))


STRATEGIES = {
    "native": (native, Native),
    "square": (square, Square),
    "grid2x2": (grid2x2, Grid2x2),
    "anyres": (anyres, AnyRes),
    "dynamic": (dynamic, Dynamic),
    "uhd": (uhd, Uhd),
    "s2": (s2, S2),
}


@dataclass(frozen=True)
class Strategy:
    """A strategy with its settings, (width, height) -> `Tiling`. It can be hashed and pickled."""

    name: str
    settings: object

    def __call__(self, width: int, height: int) -> Tiling:
        return _tiling(self, width, height)


@functools.lru_cache(maxsize=8192)
def _tiling(chosen, width, height):
    return STRATEGIES[chosen.name][0](width, height, chosen.settings)


def strategy(name: str, **settings) -> Strategy:
    """Returns a named strategy; lists among the settings become tuples."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy {name!r} is unknown: use one of {sorted(STRATEGIES)}")
    kind = STRATEGIES[name][1]
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"strategy {name!r} has no settings {unknown}, it has {known}: rename")
    return Strategy(name, kind(**{k: _frozen(v) for k, v in settings.items()}))


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Plan:
    """Which strategy the pictures of a sample get; each is a tuple, one for each encoder.

    LLaVA-NeXT-Interleave: `image` is AnyRes, `images` and `frame` are Square. Cambrian-1: `image`
    holds four Squares, each with the size and the mean colour of its encoder.

    Attributes:
      image: for an image that is alone in its sample.
      images: for each of several images; () = as one alone.
      frame: for each frame of a video; () = as each of several images.
    """

    image: tuple[Strategy, ...]
    images: tuple[Strategy, ...] = ()
    frame: tuple[Strategy, ...] = ()

    def __call__(self, width: int, height: int, *, images: int = 1, video: bool = False):
        """Returns the tilings of a picture, one for each encoder.

        `images` counts those of the sample that are no frames, `video` is for a frame.
        """
        several = self.images or self.image
        chosen = (self.frame or several) if video else self.image if images == 1 else several
        return tuple(tile(width, height) for tile in chosen)
