"""Which encoders, connectors, strategies and formats fit each other; why the others do not.

    check(model, picture)           # ValueError: which two parts disagree, and what would fit

Parts are free to choose, but a table of positions has a size, a window a grid to lie in and a
newline a row to end. Each rule below is about two parts. They see the tilings that the strategies
make for some pictures, never pixels, and run when a config is resolved.
"""

from vlmjax.connectors.c_abstractor import CAbstractorConfig
from vlmjax.connectors.conv_glu import ConvGLUConfig
from vlmjax.connectors.perceiver import PerceiverConfig
from vlmjax.connectors.qformer import QFormerConfig
from vlmjax.connectors.resampler import ResamplerConfig
from vlmjax.connectors.sva import SVAConfig
from vlmjax.data.picture import PictureConfig, Show
from vlmjax.data.resize import blank
from vlmjax.vision.convnext import ConvNeXtConfig

# Connectors that read the features of one source.
SINGLE = (ConvGLUConfig, PerceiverConfig, QFormerConfig, ResamplerConfig)
# Pictures that are tried, as (width, height) in sides of a view.
PICTURES = ((1, 1), (2, 2), (0.3, 0.4), (3, 2), (1, 2.5), (6, 1))


def check(model, picture):
    """Raises ValueError where the parts of a `VLMConfig` and a `PictureConfig` disagree.

    Args:
      model: a `VLMConfig`; one without vision fits anything.
      picture: settings of a `PictureConfig`, or None for pictures in native size.
    """
    if model.vision is None:
        return
    counted(model)
    if picture is None:
        native_size(model)
        return
    settings = PictureConfig(**picture)
    show = Show(settings, model.form)  # names vectors that a format lacks
    resampled(model, settings)
    pooled(model, show)
    sides = {}
    for video, images in ((False, 1), (False, 2), (True, 1)):
        form = show.frame_format if video else show.format
        for width, height in pictures(show, video, images):
            tilings = show.plan(width, height, images=images, video=video)
            what = f"a {'frame' if video else 'picture'} of {width} x {height} pixels"
            grids = [
                view_grids(tower, tiling, what)
                for tower, tiling in zip(model.encoders.values(), tilings, strict=True)
            ]
            mapped(model, settings, tilings, grids)
            if isinstance(model.connector, CAbstractorConfig):
                squares(settings, tilings, model.form, grids, sides, what)
            # A video is arranged frame after frame, an image view after view.
            if form.layout != "frames":
                arranged(model, settings, form, tilings[0])
            elif not video:
                raise ValueError(
                    "layout 'frames' and images disagree: it is for the frames of videos; set it "
                    "in frame_format, and another layout in format"
                )
        side_by_side(show, video, images)
    rows_of(model, show)


def counted(model):
    """A connector takes so many sources."""
    connector, sources = model.connector, model.form.encoders
    number = 1 if isinstance(connector, SINGLE) else None
    if isinstance(connector, CAbstractorConfig):
        number = len(connector.copies)
    if number not in (None, len(sources)):
        raise ValueError(
            f"model.sources={sources} and the connector {type(connector).__name__} disagree: it "
            f"takes {number}, which of the C-Abstractor are its `copies`; take one encoder with "
            "sources=(), or connector type 'mlp' or 'sva', which take several"
        )


def side_by_side(show, video, images):
    """Features of several sources that are joined place by place need maps of one size."""
    joined = [sources for sources, _ in show.form.groups if len(sources) > 1]
    if show.form.unit.kind != "window" or not joined:
        return
    width, height = pictures(show, video, images)[0]
    seen = show([blank(height, width)], video=video, images=images)
    for sources in joined:
        grids = {k: seen.units[k].grids for k in sources}
        if len(set(grids.values())) > 1:
            raise ValueError(
                f"the maps of sources {sources} and the connector disagree: it joins their "
                f"features place by place, their tokens form {grids}; bring them to one size with "
                "resample and reduce='weighted', or take views that give it"
            )


def pictures(show, video, images):
    """Returns the sizes of pictures that are tried, the larger ones of several views."""
    several = show.plan.images or show.plan.image
    chosen = (show.plan.frame or several) if video else show.plan.image if images == 1 else several
    side = max(getattr(s.settings, "side", 32 * show.form.towers[0].patch) for s in chosen)
    return [(max(round(w * side), 8), max(round(h * side), 8)) for w, h in PICTURES]


def native_size(model):
    """Pictures in native size come as windows of patches to one ViT with 2-D RoPE."""
    towers, connector = list(model.encoders.values()), model.connector
    if len(towers) > 1 or getattr(towers[0], "position", "") != "rope2d":
        kinds = [getattr(t, "position", "of a ConvNeXt") for t in towers]
        raise ValueError(
            f"pictures in native size and encoders with positions {kinds} disagree: a picture has "
            "any number of rows and columns, which 2-D RoPE takes; set position='rope2d' or give "
            "the processor `picture` with a strategy"
        )
    rule = connector.unit
    if rule.kind != "window" or rule.side > 1 or model.pool != "none":
        raise ValueError(
            f"pictures in native size and a connector of units {rule} with pool {model.pool!r} "
            "disagree: their windows are those of the processor's merge sizes, one token each; "
            "take connector type 'mlp' with window=1, or give the processor `picture`"
        )


def view_grids(tower, tiling, what):
    """Returns the (rows, columns) of the patches of each view; the tower must have room for it."""
    grids = [tuple(n // tower.patch for n in view.size) for view in tiling.views]
    position, side = getattr(tower, "position", ""), getattr(tower, "side", 0)
    for grid in grids:
        shown = f"a view of {grid[0]} x {grid[1]} patches ({what})"
        if isinstance(tower, ConvNeXtConfig):
            if grid != (tower.rows, tower.columns):
                raise ValueError(
                    f"the ConvNeXt and the strategy disagree: {shown} for rows={tower.rows}, "
                    f"columns={tower.columns}; it takes views of one size, of a strategy with side="
                    f"{tower.rows * tower.patch}"
                )
        elif position == "table" and grid != (side, side):
            raise ValueError(
                f"the positions of the encoder and the strategy disagree: {shown} for a table of "
                f"side={side}, which position='table' looks up as it is; take position='bicubic', "
                f"or views of {side * tower.patch} pixels"
            )
    return grids


def resampled(model, settings):
    """Features that are resized need a connector that sums by weights."""
    if not model.form.weighted and (settings.resample or settings.frame_resample):
        raise ValueError(
            f"resample={settings.resample} and the connector {type(model.connector).__name__} "
            "disagree: resized features are sums with weights; take connector type 'mlp' or 'sva' "
            "with reduce='weighted', or leave resample out"
        )


def pooled(model, show):
    """Tokens that a format pools need a model that pools them, and in that way."""
    for form in (show.format, show.frame_format):
        kind = {"none": "none", "max": "max"}.get(form.pool, "weighted")
        kind = "weighted" if form.max_tiles else kind
        if kind != "none" and model.pool != kind:
            raise ValueError(
                f"pool={form.pool!r}, max_tiles={form.max_tiles} of the format and model.pool="
                f"{model.pool!r} disagree: set model.pool={kind!r}"
            )


def mapped(model, settings, tilings, grids):
    """What a connector maps at once must be there: maps for each source, class tokens, windows."""
    rule, connector = model.connector.unit, model.connector
    encoders, towers = model.form.encoders, model.form.towers
    for e, (tiling, tower) in enumerate(zip(tilings, towers, strict=True)):
        stitched = settings.stitch == "tiles" and any(m != (1, 1) for m in tiling.maps)
        if rule.prefix > (0 if tower.out else tower.prefix):
            raise ValueError(
                f"the connector and encoder {e} disagree: {type(connector).__name__} reads prefix="
                f"{rule.prefix} slots in front of the patches, the encoder gives "
                f"{0 if tower.out else tower.prefix}; set the connector's prefix to that"
            )
        if rule.prefix and stitched:
            raise ValueError(
                f"stitch='tiles' and the connector disagree: {type(connector).__name__} reads the "
                f"class token of its view (prefix={rule.prefix}), a map of several tiles has as "
                "many; set prefix=0 or stitch='none'"
            )
        maps = len(tiling.maps if settings.stitch == "tiles" else tiling.views)
        sources = encoders.count(e)
        if sources and maps % sources:
            raise ValueError(
                f"the strategy and model.sources={encoders} disagree: a picture has {maps} maps "
                f"for {sources} sources of encoder {e}, which take turns; take a strategy that "
                "always gives a multiple of that"
            )
    if isinstance(connector, SVAConfig):
        aggregated(connector, settings, tilings, model.form, grids)


def squares(settings, tilings, form, grids, sides, what):
    """The C-Abstractor maps squares, for each source all of one size.

    Args:
      sides: {source: side} of pictures before, which is added to.
    """
    for source, e in enumerate(form.encoders):
        tiles = tilings[e].maps if settings.stitch == "tiles" else [(1, 1)] * len(grids[e])
        turn, turns = form.encoders[:source].count(e), form.encoders.count(e)
        first = [sum(r * c for r, c in tiles[:k]) for k in range(len(tiles))]
        for k in range(turn, len(tiles), turns):
            (rows, columns), (h, w) = tiles[k], grids[e][first[k]]
            side = sides.setdefault(source, rows * h)
            if (rows * h, columns * w) != (side, side):
                raise ValueError(
                    f"the C-Abstractor and the strategy disagree: {what} gives source {source} a "
                    f"map of {rows * h} x {columns * w} patches, it takes squares of one size "
                    f"({side} x {side}); take a strategy of square views, or another connector"
                )


def aggregated(connector, settings, tilings, form, grids):
    """SVA has queries over one picture, padded to a square, in each of its towers."""
    if len(connector.windows) != len(form.encoders):
        raise ValueError(
            f"SVA windows={connector.windows} and model.sources={form.encoders} disagree: give "
            "one window side for each source"
        )
    for k, e in enumerate(form.encoders):
        (height, width), views = tilings[e].size, tilings[e].views
        if len(views) > 1 or (height != width and views[0].ops[0][0] != "pad"):
            raise ValueError(
                "SVA and the strategy disagree: its queries lie over one view of a picture padded "
                "to a square; take the strategy 'square' with mode='pad' for each encoder"
            )
        resample = settings.resample[k] if settings.resample else ()
        have = resample[1] if resample else form.towers[e].out or grids[e][0]
        want = connector.side * connector.windows[k]
        if tuple(have) != (want, want):
            raise ValueError(
                f"SVA and encoder {e} disagree: {connector.side} x {connector.side} queries with "
                f"windows of {connector.windows[k]} need a map of {want} x {want}, it is "
                f"{have[0]} x {have[1]}; change side, windows or the views, or resample to that"
            )


def arranged(model, settings, form, tiling):
    """A layout must find the views where it expects them."""
    first = tiling.whole == 0
    views = len(tiling.views)
    if form.layout in ("tiles", "slices") and (not first or settings.stitch != "none"):
        raise ValueError(
            f"layout {form.layout!r} and the strategy disagree: it puts the whole view first, "
            f"which here is number {tiling.whole} of {views} with stitch={settings.stitch!r}; take "
            "the strategy 'anyres' or 'uhd' with stitch='none', or layout 'flat'"
        )
    if form.layout == "square" and views > 1:
        raise ValueError(
            f"layout 'square' and the strategy disagree: it arranges one view, here are {views}; "
            "take the strategy 'square', or layout 'tiles' or 'flat'"
        )


def rows_of(model, show):
    """Rows of tokens need a connector whose tokens form a grid."""
    rule, tokens = model.connector.unit, model.connector.tokens
    for form in (show.format, show.frame_format):
        if form.layout in ("flat", "slices"):
            continue
        if form.layout == "frames" and form.newline != "row" and form.pool == "none":
            continue
        name = type(model.connector).__name__
        if rule.kind == "map" and (rule.out is None or tokens != rule.out[0] * rule.out[1]):
            raise ValueError(
                f"layout {form.layout!r} and the connector disagree: it arranges rows of tokens, "
                f"those of {name} form no grid; take the connector 'mlp', 'conv_glu' or "
                "'c_abstractor', or layout 'flat' or 'slices'"
            )
        if rule.order == "column":
            raise ValueError(
                f"layout {form.layout!r} and the connector disagree: it arranges rows of tokens, "
                f"with order='column' those of {name} come column after column; set order='row' or "
                "take layout 'flat'"
            )
