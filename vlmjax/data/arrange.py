"""The sequence that stands for an image or a video: which visual token comes where, and between.

    form = Format(layout="tiles", unpad="original", newline="row", specials=("image_newline",))
    made = arrange(tiling, [(24, 24)] * len(tiling.views), form)    # made.pieces, made.pool

The visual tokens of an image are numbered as the connector makes them: unit after unit. A piece is
control token, text, or an i32 array of visual tokens, in which -1 - k is the k-th learned vector of
`Format.specials`. Where tokens are pooled after the connector, `pool` says how, and the pieces
count the pooled tokens.

Layouts:

    "flat"    the tokens as they come: LLaVA-1.5, InternVL, 360VL, VILA, CogVLM2, GLM-4V
    "tiles"   the whole view, then the rows of the map that the tiles form: AnyRes
    "square"  the rows of the one map of a picture that was padded to a square: Cambrian-1
    "slices"  <image>...</image><slice><image>...</image>...\\n...</slice>: MiniCPM-V
    "numbered" Frame1: <img>...</img>\\nFrame2: <img>...</img>: videos of InternVL
    "frames"  the pooled frames of a video one after another: LLaVA-NeXT-Video

Videos are arranged as a whole by "flat", "numbered" and "frames", by the others frame after frame,
each as an image.

Adding one: a function (tiling, maps of token numbers, format) -> (i32[n] or pieces, pool), and a
line in LAYOUTS with what it reads of the format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlmjax.data import units
from vlmjax.data.anyres import READINGS, cap, unpad
from vlmjax.data.templates import CONTROL, TEXT, VISUAL
from vlmjax.data.views import Tiling


class Piece(NamedTuple):
    """A part of the sequence: `chat.CONTROL` and a token, TEXT and text, or VISUAL and i32[n]."""

    kind: str
    value: str | np.ndarray


class Arrangement(NamedTuple):
    """The sequence of one image or video.

    Attributes:
      pieces: in order; in visual ones -1 - k is the k-th special, others are visual tokens.
      pool: units of visual tokens that are pooled first, whose results the pieces then count; None
        = no pooling. Units with weights are sums, without weights the largest value of each
        channel. Only tokens that are used are pooled; those that stay as they are are units of one.
      steps: i32[n] for the n entries of all visual pieces, by how much the position grows at each;
        None = by 1, as at any other token.
    """

    pieces: list[Piece]
    pool: units.Units | None
    steps: np.ndarray | None

    @property
    def entries(self) -> np.ndarray:
        """Returns i32[n], the visual pieces as one."""
        return np.concatenate([p.value for p in self.pieces if p.kind == VISUAL])


@dataclass(frozen=True)
class Format:
    """How the tokens of an image or a video are arranged.

    Attributes:
      layout: see the module.
      specials: names of the learned vectors, in the order of their ids.
      newline: where the first special named "...newline" stands: after each "row" (of each frame),
        after each "frame", at the "end", or "none".
      base: "first", or "none": without the whole view where there are tiles.
      unpad: "none", or drop the rows and columns of padding, rounded as "original" or
        "transformers".
      max_tiles: cap on the tokens of the tiles' map in tiles (anyres_max_N); 0 = none.
      pool: of tokens, "none", "average", "max" or "bilinear"; of each frame, or of the tiles' map
        (the map of maxpool2x2).
      stride: of the pooling.
      fast_every: in a video only every n-th frame is pooled by `stride`, the others by twice that,
        and each frame is followed by the special "faster"; 0 = all are alike.
      control: tokens around the whole, as ("<img>", "</img>"); () = none.
      vectors: specials around the visual tokens, as ("boi", "eoi"); () = none.
      between: text between the frames of a video, where they are arranged one by one.
      positions: "sequential", or "shared": all visual tokens between the vectors have one position.
    """

    layout: str = "flat"
    specials: tuple[str, ...] = ()
    newline: str = "none"
    base: str = "first"
    unpad: str = "none"
    max_tiles: int = 0
    pool: str = "none"
    stride: int = 2
    fast_every: int = 0
    control: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    between: str = ""
    positions: str = "sequential"

    def __post_init__(self):
        self._check_choices()
        self._check_layout()
        needed = list(self.vectors)
        needed += ["newline"] * (self.newline != "none") + ["faster"] * (self.fast_every > 0)
        for name in needed:
            self.special(name)
        for name in ("control", "vectors"):
            if len(getattr(self, name)) not in (0, 2):
                raise ValueError(f"Format.{name} is {getattr(self, name)}: give two names or none")
        if self.fast_every and (self.newline != "row" or self.pool == "none"):
            raise ValueError(
                f"Format.fast_every is {self.fast_every} with newline {self.newline!r} and pool "
                f"{self.pool!r}: slow and fast frames need newline 'row' and a pool"
            )
        if self.max_tiles and (self.unpad == "none" or self.pool != "none"):
            raise ValueError(
                f"Format.max_tiles is {self.max_tiles} with unpad {self.unpad!r} and pool "
                f"{self.pool!r}: the cap needs unpad and no other pool"
            )

    def _check_choices(self):
        for name, known in (
            ("layout", LAYOUTS),
            ("newline", ("none", "row", "frame", "end")),
            ("base", ("first", "none")),
            ("unpad", ("none", *READINGS)),
            ("pool", ("none", *units.POOLS)),
            ("positions", ("sequential", "shared")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Format.{name} is {getattr(self, name)!r}: use one of {sorted(known)}"
                )
        for name, least in (("stride", 1), ("max_tiles", 0), ("fast_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"Format.{name} is {getattr(self, name)}, it must be at least {least}: correct "
                    "it"
                )

    def _check_layout(self):
        """What the layout would ignore is refused."""
        layout = LAYOUTS[self.layout]
        if self.newline not in layout.newlines:
            raise ValueError(
                f"Format.newline is {self.newline!r} with layout {self.layout!r}, which knows "
                f"{layout.newlines}: choose one of them, or another layout"
            )
        for name in set(READ_BY_SOME) - set(layout.reads):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"Format.{name} is {getattr(self, name)!r}, layout {self.layout!r} reads only "
                    f"{layout.reads}: leave it out, or choose another layout"
                )

    def special(self, name: str) -> int:
        """Returns -1 - k of the special of this name, or whose name ends with "_" and it."""
        for k, special in enumerate(self.specials):
            if special == name or special.endswith("_" + name):
                return -1 - k
        raise ValueError(
            f"the format needs a special named {name!r}, specials are {self.specials}: add it"
        )


def arrange(tiling: Tiling | None, grids: Sequence[tuple[int, int]], form: Format) -> Arrangement:
    """Returns the sequence of one image, or of a video whose layout arranges it as a whole.

    Args:
      tiling: of the image; a video (layout "frames") needs none.
      grids: (rows, columns) of the tokens of each view, each map or each frame, as the connector
        gives them (`Units.grids`); tokens that form no grid, such as learned queries, are (1, n).
      form: a `Format`.
    """
    return _arranged(tiling, units.view_maps(grids), form)


def arrange_video(tiling: Tiling, groups: Sequence, frames: int, form: Format) -> Arrangement:
    """Returns the sequence of a video, as a whole or frame after frame.

    Args:
      tiling: of each frame; they have one size.
      groups: for each group of sources, the grids of the maps of all frames, see `arrange`.
      frames: how many there are.
      form: a `Format`.
    """
    maps, start = units.view_maps(sum(groups, ())), 0
    if LAYOUTS[form.layout].video == "whole" and not form.between:
        return _arranged(tiling, maps, form)
    shown = [[] for _ in range(frames)]
    for grids in groups:
        share = len(grids) // frames
        for k, some in enumerate(shown):
            some += maps[start + k * share : start + (k + 1) * share]
        start += len(grids)
    return _in_sequence([_arranged(tiling, some, form) for some in shown], form.between)


def _in_sequence(made, between):
    """Returns arrangements, all pooled or none, one after another with the text `between` them."""
    pieces, pools, start = [], [], 0
    for part in made:
        pieces += [Piece(TEXT, between)] if pieces and between else []
        pieces += [_counted(piece, start) for piece in part.pieces]
        if part.pool is not None:
            pools.append(part.pool)
            start += len(part.pool.index)
    steps = None if made[0].steps is None else np.concatenate([part.steps for part in made])
    return Arrangement(pieces, units.join(pools) if pools else None, steps)


def _counted(piece, start):
    """Returns a piece whose visual tokens are counted from `start`."""
    if piece.kind != VISUAL or not start:
        return piece
    return Piece(VISUAL, np.where(piece.value >= 0, piece.value + start, piece.value))


def _arranged(tiling, maps, form):
    body, pool = LAYOUTS[form.layout].function(tiling, maps, form)
    pieces = body if isinstance(body, list) else [_visual(body, form)]
    if form.control:
        pieces = [Piece(CONTROL, form.control[0]), *pieces, Piece(CONTROL, form.control[1])]
    steps = None
    if form.positions == "shared":
        parts = [_shared_steps(len(p.value), form) for p in pieces if p.kind == VISUAL]
        steps = np.concatenate(parts)
    return Arrangement(pieces, pool, steps)


def _visual(tokens, form):
    if form.vectors:
        first, last = map(form.special, form.vectors)
        tokens = np.concatenate([[first], tokens, [last]])
    return Piece(VISUAL, tokens.astype(np.int32))


def _shared_steps(n, form):
    """1 at the first vector, at the first token and at the last vector."""
    steps = np.zeros(n, np.int32)
    steps[:1] = 1
    if form.vectors:
        steps[[1, -1]] = 1
    return steps


def _flat(tiling, maps, form):
    tokens = np.concatenate([m.ravel() for m in maps])
    if form.newline == "end":
        tokens = np.append(tokens, form.special("newline"))
    return tokens, None


def _rows(patches, form):
    """The tokens of a map row by row, each row followed by the newline where the format says so."""
    if form.newline == "row":
        patches = np.pad(patches, ((0, 0), (0, 1)), constant_values=form.special("newline"))
    return patches.ravel()


def _unpadded(patches, size, form):
    if form.unpad == "none":
        return patches
    top, left, rows, columns = unpad(patches.shape, size, form.unpad)
    return patches[top : top + rows, left : left + columns]


def _square(tiling, maps, form):
    if len(maps) != 1:
        raise ValueError(
            f"{len(maps)} token grids: layout 'square' arranges one; take the strategy 'square', "
            "or layout 'tiles' or 'flat'"
        )
    (patches,) = maps
    return _rows(_unpadded(patches, tiling.size, form), form), None


def _tiles(tiling, maps, form):
    if len(maps) != len(tiling.views) or tiling.whole != 0:
        raise ValueError(
            f"{len(maps)} token grids for {len(tiling.views)} views, whole view {tiling.whole}: "
            "layout 'tiles' needs a grid for each view and the whole view first"
        )
    base, *tiles = maps
    if not tiles:  # a single view is not unpadded, and ends with one newline
        end = [form.special("newline")] if form.newline == "row" else []
        return np.append(base.ravel(), end), None
    canvas = _unpadded(units.stitch(tiles, tiling.grid), tiling.size, form)
    pool = None
    if form.pool != "none":
        pool = units.POOLS[form.pool](canvas, form.stride)
    elif form.max_tiles:
        size = cap(canvas.shape, form.max_tiles, tiles[0].shape[0])
        pool = units.bilinear(canvas, size) if size != canvas.shape else None
    whole = [base] if form.base == "first" else []
    if pool is not None:
        kept = [units.unpooled(m, pool.weights is not None) for m in whole]
        pool = units.join([*kept, pool])
        *whole, canvas = units.view_maps(pool.grids)
    return np.concatenate([*(m.ravel() for m in whole), _rows(canvas, form)]), pool


def _slices(tiling, maps, form):
    if len(maps) != len(tiling.views) or tiling.whole != 0:
        raise ValueError(
            f"{len(maps)} token grids for {len(tiling.views)} views, whole view {tiling.whole}: "
            "layout 'slices' needs a grid for each view and the whole view first"
        )
    opening, closing = Piece(CONTROL, "<image>"), Piece(CONTROL, "</image>")
    views = [[opening, _visual(m.ravel(), form), closing] for m in maps]
    pieces = list(views[0])
    if tiling.grid:
        rows, columns = tiling.grid
        pieces.append(Piece(CONTROL, "<slice>"))
        for r in range(rows):
            if r:
                pieces.append(Piece(TEXT, "\n"))
            for view in views[1 + r * columns : 1 + (r + 1) * columns]:
                pieces += view
        pieces.append(Piece(CONTROL, "</slice>"))
    return pieces, None


def _numbered(tiling, maps, form):
    pieces = []
    for k, tokens in enumerate(maps):
        before = "\n" * (k > 0) + f"Frame{k + 1}: "
        pieces += [Piece(TEXT, before), Piece(CONTROL, "<img>")]
        pieces += [_visual(tokens.ravel(), form), Piece(CONTROL, "</img>")]
    return pieces, None


def _frames(tiling, maps, form):
    pool = None
    if form.pool != "none":
        strides = [
            form.stride * (2 if form.fast_every and k % form.fast_every else 1)
            for k in range(len(maps))
        ]
        shrink = units.POOLS[form.pool]
        pool = units.join(shrink(m, s) for m, s in zip(maps, strides, strict=True))
        maps = units.view_maps(pool.grids)
    after = []
    if form.newline == "frame":
        after = [form.special("newline")]
    elif form.fast_every:
        after = [form.special("faster")]
    tokens = np.concatenate([np.append(_rows(m, form), after) for m in maps])
    if form.newline == "end":
        tokens = np.append(tokens, form.special("newline"))
    return tokens, pool


class Layout(NamedTuple):
    """A function, where newlines may stand, and which of READ_BY_SOME it reads of the format.

    `control` are the tokens that it puts in place itself. Of a `video` it is given the maps of all
    frames ("whole"), or those of a frame at a time ("frames", and wherever text comes between).
    """

    function: Callable
    newlines: tuple[str, ...] = ("none",)
    reads: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    video: str = "frames"


def control_of(form: dict) -> tuple[str, ...]:
    """Returns the control tokens that settings of a `Format` put into a sequence."""
    layout = LAYOUTS.get(form.get("layout", Format.layout))
    return (*form.get("control", ()), *(layout.control if layout else ()))


READ_BY_SOME = ("base", "unpad", "max_tiles", "pool", "stride", "fast_every", "between")
LAYOUTS = {
    "flat": Layout(_flat, ("none", "end"), ("between",), video="whole"),
    "tiles": Layout(
        _tiles, ("none", "row"), ("base", "unpad", "max_tiles", "pool", "stride", "between")
    ),
    "square": Layout(_square, ("none", "row"), ("unpad", "between")),
    "slices": Layout(
        _slices, reads=("between",), control=("<image>", "</image>", "<slice>", "</slice>")
    ),
    "numbered": Layout(_numbered, control=("<img>", "</img>"), video="whole"),
    "frames": Layout(
        _frames, ("none", "row", "frame", "end"), ("pool", "stride", "fast_every"), video="whole"
    ),
}
