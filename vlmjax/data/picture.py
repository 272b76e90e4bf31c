"""From a picture or a video to views, units of the connector and their place in the sequence.

    show = Show(PictureConfig(strategy=({"name": "square", "side": 336},)), form)
    seen = show([image], video=False, alone=True)

What the model is made of comes with its `batch.Form`; which views it gets and how their tokens are
arranged is data: strategies (`data.strategies`), units (`data.units`), formats (`data.arrange`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlmjax import batch
from vlmjax.data import units
from vlmjax.data.arrange import Arrangement, Format, arrange, arrange_video
from vlmjax.data.coords import COORDS
from vlmjax.data.resize import blank, blank_rows, is_blank, patch_rows
from vlmjax.data.sample import Item, Placement, group_bases, number_tokens
from vlmjax.data.strategies import Plan, strategy
from vlmjax.data.views import Tiling, render

RESAMPLE = {
    "none": lambda m: units.unpooled(m),
    "area": units.area,
    "bilinear": units.bilinear,
    **{f"pool_{name}": pool for name, pool in units.POOLS.items()},
}


@dataclass(frozen=True)
class PictureConfig:
    """Which views pictures get and how their tokens come in sequence.

    Attributes:
      strategy: for an image alone in its sample, settings of `strategies.strategy` with its name;
        one for each encoder.
      several: for each of several images; () = as for one alone.
      frame: for each frame of a video; () = as for several images.
      stitch: "none", or "tiles": tiles that continue each other are one map before the connector.
      resample: for each source, what becomes of the features of a map before the connector (which
        has reduce="weighted"): () or (a key of `RESAMPLE`, its argument), such as
        ("area", (27, 27)).
      frame_resample: the same for frames; () = as for images.
      format, frame_format: settings of `arrange.Format` for images and for videos.
    """

    strategy: tuple
    several: tuple = ()
    frame: tuple = ()
    stitch: str = "none"
    resample: tuple = ()
    frame_resample: tuple = ()
    format: tuple = ()
    frame_format: tuple = ()

    def __post_init__(self):
        if self.stitch not in ("none", "tiles"):
            raise ValueError(f"stitch is {self.stitch!r}: use 'none' or 'tiles'")
        for op in (*self.resample, *self.frame_resample):
            if op and op[0] not in RESAMPLE:
                raise ValueError(f"resample has {op}: use one of {sorted(RESAMPLE)}, or ()")


class Seen(NamedTuple):
    """A picture or a video: its views, the units of each source, and what stands for it."""

    items: list[Item]
    units: list[units.Units]
    arrangement: Arrangement


class Show:
    """Makes `Seen` of pictures for one model."""

    def __init__(self, config: PictureConfig, form: batch.Form):
        self.config, self.form = config, form
        plan = (config.strategy, config.several, config.frame)
        self.plan = Plan(*(tuple(strategy(**dict(s)) for s in chosen) for chosen in plan))
        if len(self.plan.image) != len(form.towers):
            raise ValueError(
                f"{len(self.plan.image)} strategies for {len(form.towers)} encoders: give one each"
            )
        names = dict(specials=form.specials)
        self.format = Format(**dict(config.format) | names)
        self.frame_format = Format(**dict(config.frame_format or config.format) | names)

    @property
    def most_patches(self):
        """The most patches of a view whose sides depend on the picture, 0 where none do."""
        chosen = (*self.plan.image, *self.plan.images, *self.plan.frame)
        return max(getattr(s.settings, "most_patches", 0) for s in chosen)

    def __call__(self, frames: Iterable[np.ndarray], *, video: bool, images: int) -> Seen:
        """Returns what the model sees of an image (one frame) or a video.

        Args:
          frames: u8[h, w, 3] pixels, `resize.blank` where only sizes matter; they are taken one by
            one.
          video: whether they are frames of a video.
          images: number of images in the sample, those of videos not counted.
        """
        tilings, items = [], [[] for _ in self.form.towers]
        for image in frames:
            height, width, _ = image.shape
            chosen = self.plan(width, height, images=images, video=video)
            tilings.append(chosen)
            for encoder, tiling in enumerate(chosen):
                items[encoder] += [self._item(encoder, view) for view in render(image, tiling)]
        found = [
            self._units(k, [t[e] for t in tilings], items[e], video)
            for k, e in enumerate(self.form.encoders)
        ]
        groups = [found[sources[0]].grids for sources, _ in self.form.groups]
        tiling = tilings[0][0]
        if video:
            made = arrange_video(tiling, groups, len(tilings), self.frame_format)
        else:
            made = arrange(tiling, sum(groups, ()), self.format)
        return Seen(sum(items, []), found, made)

    def _item(self, encoder, view):
        tower = self.form.towers[encoder]
        h, w = (n // tower.patch for n in view.shape[:2])
        pixels = view[: h * tower.patch, : w * tower.patch]
        if is_blank(pixels):
            rows = blank_rows(pixels.shape[:2], tower.patch)
        else:
            rows = patch_rows(pixels, pixels.shape[:2], tower.patch, 1)
        return Item(
            rows,
            (h, w),
            1,
            np.ones(h * w, bool),
            encoder=encoder,
            prefix=tower.prefix,
            coords=COORDS[tower.position]((h, w), tower.side),
            out=tower.out and tower.out[0] * tower.out[1],
        )

    def _units(self, source, tilings: list[Tiling], items, video):
        """Returns the units of a source; their index counts the output slots of these items."""
        form, config = self.form, self.config
        tower = form.towers[form.encoders[source]]
        prefix = tower.prefix if tower.out is None else 0  # a grid of its own comes without
        maps = units.view_maps([tower.out or item.grid for item in items], prefix)
        if config.stitch == "tiles":
            maps = units.stitch_groups(maps, [group for t in tilings for group in t.maps])
        encoder, tokens = form.encoders[source], {k: n for ks, n in form.groups for k in ks}
        maps = maps[form.encoders[:source].count(encoder) :: form.encoders.count(encoder)]
        resample = (config.frame_resample if video else ()) or config.resample
        rule = dict(tokens=tokens[source], size=tilings[0].size)
        if not form.weighted:
            return units.by_rule(form.unit, maps, **rule)
        op = resample[source] if resample else ()
        inner = units.join(RESAMPLE[op[0]](m, *op[1:]) if op else units.unpooled(m) for m in maps)
        outer = units.by_rule(form.unit, units.view_maps(inner.grids), **rule)
        return compose(outer, inner)


def compose(outer: units.Units, inner: units.Units) -> units.Units:
    """Returns units whose places are units: G of `outer` times G of `inner`, place after place."""
    there = outer.index >= 0
    index = np.where(there[..., None], inner.index[outer.index], -1)
    weights = np.where(index >= 0, inner.weights[outer.index], 0).astype(np.float32)
    flat, mask = (len(index), -1), outer.mask
    if mask is not None:
        mask = np.repeat(mask, inner.index.shape[1], axis=1)
    return outer._replace(index=index.reshape(flat), weights=weights.reshape(flat), mask=mask)


def row_budget(show: Show, tokens: int, views: int, multiple: int = 1) -> batch.Budget:
    """Returns the `Budget` of rows of so many tokens that hold so many views of the first encoder.

    What else a view needs (slots of other encoders, units of each source) is counted on a picture
    that gets as many views as there are: alone, among others, and as a frame. Slots of patches, and
    of tokens with weights of their own, are a multiple of `multiple` where padding can be added.
    """
    side = 8 * max(tower.patch * max(tower.side, 32) for tower in show.form.towers)
    image, form = blank(side, side), show.form
    kinds = [(False, 1), (False, 2), (True, 1)]
    shown = [show([image], video=video, images=images) for video, images in kinds]
    number = [sum(item.encoder == 0 for item in seen.items) for seen in shown]

    def share(count):
        return max(-(-views * count(s) // n) for s, n in zip(shown, number, strict=True))

    def padded(count):
        return -(-count // multiple) * multiple

    def slots(encoder):
        number = share(lambda s: sum(i.num_slots for i in s.items if i.encoder == encoder))
        return number if form.towers[encoder].out else padded(number)

    units_of = [share(lambda s, k=k: len(s.units[k].index)) for k in range(len(form.encoders))]
    widest = [max(s.units[k].index.shape[1] for s in shown) for k in range(len(form.encoders))]
    visual = sum(n * units_of[sources[0]] for sources, n in form.groups)
    routed = {"none": 0, "expert": min(tokens, padded(visual + views)), "queries": visual}
    most = show.most_patches if form.unit.kind == "map" else 0
    pools = [s.arrangement.pool for s in shown if s.arrangement.pool is not None]
    widths = [pool.index.shape[1] for pool in pools]
    pooled = (tokens if views else 0, max(widths, default=1))
    return batch.Budget(
        tokens,
        tuple(map(slots, range(len(form.towers)))),
        tuple(units_of),
        tuple(max(n, most) for n in widest),
        pooled if form.pool != "none" else (0, 0),
        routed[form.routed],
    )


def place(seen: Sequence[Seen], encoded, form: batch.Form) -> Placement:
    """Returns the `Placement` of a sample.

    Args:
      seen: its pictures and videos in reading order.
      encoded: a `chat.Encoded` whose visual entries count the tokens of each of them.
      form: of the model.
    """
    slots = np.zeros(len(form.towers), np.int64)
    first = np.zeros(len(form.encoders), np.int64)
    counts = np.array([[len(u.index) for u in s.units] for s in seen])
    bases = group_bases(form, counts.sum(0))
    made, pools, tables, pooled = [[] for _ in form.encoders], [], [], 0
    for s, here in zip(seen, counts, strict=True):
        for k, u in enumerate(s.units):
            made[k].append(units.shifted(u, slots[form.encoders[k]]))
        table, first = number_tokens(form, here, first, bases), first + here
        if form.pool != "none":
            pool = s.arrangement.pool or units.unpooled(np.arange(len(table))[None])
            pools.append(pool._replace(index=np.where(pool.index >= 0, table[pool.index], -1)))
            table, pooled = pooled + np.arange(len(pool.index)), pooled + len(pool.index)
        tables.append(table)
        for item in s.items:
            slots[item.encoder] += item.num_out
    source = np.full(len(encoded.tokens), -1, np.int64)
    steps = np.ones(len(source), np.int64)
    for number, (s, table) in enumerate(zip(seen, tables, strict=True)):
        at = np.flatnonzero(encoded.picture == number)
        entry = encoded.entry[at]
        source[at] = np.where(entry >= 0, table[np.maximum(entry, 0)], entry - 1)
        if s.arrangement.steps is not None:
            steps[at] = s.arrangement.steps
    return Placement(
        units=tuple(_batch_units(units.join(parts)) for parts in made),
        source=source.astype(np.int32),
        pool=_batch_units(units.join(pools)) if pools else None,
        positions=(np.cumsum(steps) - 1).astype(np.int32),
        routed=ROUTED[form.routed](encoded, source, sum(map(len, tables))),
    )


def _batch_units(u: units.Units) -> batch.Units:
    return batch.Units(units.coded(u), u.weights, u.sizes)


def _expert(encoded, source, number):
    """All slots of each picture but the last (boi and patches, not eoi): CogVLM's rule."""
    following = np.append(encoded.picture[1:], -1)
    return np.flatnonzero((encoded.picture >= 0) & (following == encoded.picture)).astype(np.int32)


def _queries(encoded, source, number):
    """The slot of each visual token, -1 where it has none."""
    slots = np.full(number, -1, np.int32)
    shown = np.flatnonzero(source >= 0)
    slots[source[shown]] = shown
    return slots


ROUTED = {"none": lambda *_: None, "expert": _expert, "queries": _queries}
