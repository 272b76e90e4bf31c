"""Every system's way from picture to sequence: token counts as published, order and cover."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiling_chain import chain, count, gradient, rule

from vlmjax.data import units
from vlmjax.data.arrange import Format, arrange
from vlmjax.data.strategies import strategy
from vlmjax.data.templates import CONTROL, VISUAL
from vlmjax.data.views import render

NEXT = Format(layout="tiles", unpad="original", newline="row", specials=("image_newline",))
INTERN = Format(control=("<img>", "</img>"))
EVA = Format(specials=("boi", "eoi"), vectors=("boi", "eoi"), positions="shared")

# name: strategy, patch, rule of the connector, format, {size: tokens}, options
SYSTEMS = {
    "llava_1_5": (
        strategy("square"),
        14,
        rule(),
        Format(),
        {(640, 480): 576, (30, 900): 576},
        {},
    ),
    "llava_next": (
        strategy("anyres"),
        14,
        rule(),
        NEXT,
        {
            (336, 336): 1176,
            (672, 672): 2928,
            (640, 480): 2340,
            (480, 640): 2352,
            (1920, 1080): 1948,
            (3000, 500): 1452,
            (200, 800): 1944,
        },
        {},
    ),
    "interleave_of_several": (
        strategy("square", side=384, fill=(127, 127, 127)),
        14,
        rule(),
        Format(layout="tiles", newline="none"),
        {(640, 480): 729},
        {},
    ),
    "internvl_1_2": (
        strategy("square", side=448, mode="resize"),
        14,
        rule(side=2, order="column"),
        INTERN,
        {(640, 480): 256},
        {},
    ),
    "internvl_1_5": (
        strategy("dynamic"),
        14,
        rule(side=2),
        INTERN,
        {
            (640, 480): 3328,
            (1920, 1080): 2304,
            (896, 896): 1280,
            (448, 448): 256,
            (3000, 500): 1792,
        },
        {},
    ),
    "minicpm_v_2_5": (
        strategy("uhd"),
        14,
        rule("map"),
        Format(layout="slices"),
        {
            (448, 448): 96,
            (1344, 1344): 960,
            (1920, 1080): 864,
            (640, 480): 288,
            (3000, 500): 768,
            (200, 800): 96,
        },
        {"tokens": 96},
    ),
    "vila_1_5": (
        strategy("square", side=384, mode="resize"),
        14,
        rule(side=2),
        Format(),
        {(640, 480): 196},
        {},
    ),
    "360vl": (
        strategy("grid2x2"),
        14,
        rule("map", out=(12, 12)),
        Format(),
        {(640, 480): 288},
        {"stitched": True},
    ),
    "360vl_per_tile": (
        strategy("grid2x2"),
        14,
        rule("map", out=(12, 12)),
        Format(),
        {(640, 480): 720},
        {},
    ),
    "cogvlm2": (
        strategy("square", side=1344, mode="resize"),
        14,
        rule(side=2, pad=False),
        EVA,
        {(640, 480): 2306},
        {},
    ),
    "glm_4v": (
        strategy("square", side=1120, mode="resize"),
        14,
        rule(side=2, pad=False),
        EVA,
        {(640, 480): 1602},
        {},
    ),
    "cambrian_1": (
        strategy("square", side=336),
        14,
        rule("map", order="cell", out=(24, 24)),
        Format(layout="square", unpad="original", newline="row", specials=("image_newline",)),
        {(500, 500): 600, (640, 480): 18 * 25, (480, 640): 24 * 19},
        {},
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_published_token_counts(name):
    tile, patch, unit, form, expected, options = SYSTEMS[name]
    assert {s: count(tile, patch, unit, form, s, **options) for s in expected} == expected


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (900, 300), (97, 400)])
def test_anyres_rows_run_across_the_tiles(size):
    """Patch colours, put in the order of the sequence, repeat the picture row by row."""
    tile = strategy("anyres", side=64, pinpoints=[[64, 128], [128, 64], [128, 128], [192, 64]])
    made = chain(gradient(*size), tile, 8, rule(), NEXT)
    colours = made.patches.reshape(-1, 64, 3).mean(1)[made.units.index[:, 0]]
    entries = made.arrangement.entries
    base, rest = colours[entries[:64]].reshape(8, 8, 3), entries[64:]
    width = int((rest == -1).argmax())
    rows = rest.reshape(-1, width + 1)
    assert (rows[:, -1] == -1).all() and (rows[:, :-1] >= 0).all()
    canvas = colours[rows[:, :-1]]
    for shown in (base, canvas[1:-1, 1:-1]):
        assert (np.diff(shown[..., 0], axis=1) > 0).all()
        assert (np.diff(shown[..., 1], axis=0) > 0).all()


def test_tiles_cover_the_canvas():
    """Cut side by side, each pixel of the resized picture is in exactly one tile."""
    rng = np.random.default_rng(0)
    tilers = {
        "anyres": strategy("anyres", side=32, pinpoints=[[32, 64], [64, 32], [64, 64], [96, 32]]),
        "dynamic": strategy("dynamic", side=32, max_tiles=6),
        "uhd": strategy("uhd", side=32, patch=4),
        "grid2x2": strategy("grid2x2", side=32, pad="square"),
        "s2": strategy("s2", side=16, scales=(16, 48), smaller="picture"),
    }
    for name, tile in tilers.items():
        for width, height in rng.integers(10, 300, (12, 2)).tolist():
            tiling = tile(width, height)
            views = render(gradient(width, height), tiling)
            assert [v.shape for v in views] == [(*v.size, 3) for v in tiling.views], name
            assert sum(r * c for r, c in tiling.maps) == len(views)
            if tiling.whole is not None:
                first = sum(r * c for r, c in tiling.maps[: tiling.maps.index((1, 1))])
                assert first == tiling.whole
            if not tiling.grid:
                continue
            rows, columns = tiling.grid
            start = 0 if tiling.whole else 1 if tiling.whole == 0 and len(views) > 1 else 0
            h, w = tiling.views[start].size
            tiles = np.stack(views[start : start + rows * columns])
            whole = tiles.reshape(rows, columns, h, w, 3).swapaxes(1, 2)
            canvas = tiling.views[start]._replace(
                ops=tuple(op for op in tiling.views[start].ops if op[0] != "crop")
            )
            (expected,) = render(gradient(width, height), tiling._replace(views=(canvas,)))
            np.testing.assert_array_equal(whole.reshape(rows * h, columns * w, 3), expected)


def test_pieces_of_internvl():
    tiling = strategy("dynamic")(1920, 1080)
    kinds = [
        (p.kind, p.value if p.kind != VISUAL else len(p.value))
        for p in arrange(tiling, [(16, 16)] * 9, INTERN).pieces
    ]
    assert kinds == [(CONTROL, "<img>"), (VISUAL, 2304), (CONTROL, "</img>")]


def abstractor(x, w, side, pool):
    """The C-Abstractor with units for its pooling and bicubic tables for its positions."""
    n = int(round(len(x) ** 0.5))
    table = w["pos_emb"][0, 1:].T.reshape(1, -1, side, side)
    pos = F.interpolate(table, size=(n, n), mode="bicubic", align_corners=False)
    x = x.T.reshape(1, -1, n, n) + pos

    def norm(x, name):
        scale, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], scale, bias, 1e-5).movedim(-1, 1)

    def conv(x, name, groups=1):
        kernel = w[f"{name}.conv.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=groups)
        return norm(x, f"{name}.bn")

    def stage(x, name):
        for b in sorted({k.split(".")[2] for k in w if k.startswith(name)}):
            pre = f"{name}.{b}"
            y = F.silu(conv(x, f"{pre}.conv1"))
            y = F.silu(conv(y, f"{pre}.conv2", y.shape[1]))
            s = y.mean((2, 3), keepdim=True)
            s = F.silu(F.conv2d(s, w[f"{pre}.se.fc1.weight"], w[f"{pre}.se.fc1.bias"]))
            y = y * F.conv2d(s, w[f"{pre}.se.fc2.weight"], w[f"{pre}.se.fc2.bias"]).sigmoid()
            y = conv(y, f"{pre}.conv3")
            short = conv(x, f"{pre}.downsample") if f"{pre}.downsample.conv.weight" in w else x
            x = F.silu(y + short)
        return x

    x = stage(x, "net.0")
    flat = x[0].flatten(1).T.numpy()
    u = units.area(np.arange(n * n, dtype=np.int32).reshape(n, n), (pool, pool))
    pooled = np.einsum("ug,ugc->uc", u.weights, flat[u.index])
    x = stage(torch.from_numpy(pooled.T.reshape(1, -1, pool, pool)), "net.2")[0].flatten(1).T
    x = F.silu(F.linear(x, w["readout.0.weight"], w["readout.0.bias"]))
    return F.linear(x, w["readout.2.weight"], w["readout.2.bias"]).numpy()


def test_golden_360vl_packing(golden):
    """Four crops as one map through one abstractor, the whole view through the other, after it."""
    z, meta = golden("cabs")
    c = meta["config"]
    side, queries = c["grid"], int(c["num_queries"] ** 0.5)
    tiling = strategy("grid2x2", side=side)(50, 40)
    maps = units.stitch_groups(units.view_maps([(side, side)] * 5), tiling.maps)
    u = units.by_rule(rule("map", out=(queries, queries)), maps)
    patches = torch.from_numpy(z["in/views"].reshape(5 * side**2, -1))
    tokens = []
    for name, index in zip(("ctt", "ori"), u.index, strict=True):
        pre = f"w/mm_projector_{name}."
        w = {k[len(pre) :]: torch.from_numpy(z[k]) for k in z.files if k.startswith(pre)}
        tokens.append(abstractor(patches[index[index >= 0]], w, side, queries))
    found = np.concatenate(tokens)[arrange(tiling, u.grids, Format()).entries]
    expected = z["out/packed"]
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"newline": "row", "specials": ("newline",)}, "with layout 'flat', which knows"),
        ({"unpad": "original"}, "Format.unpad is 'original', layout 'flat' reads only ()"),
        ({"layout": "frames", "stride": 0}, "Format.stride is 0, it must be at least 1"),
        ({"layout": "rows"}, "Format.layout is 'rows': use one of"),
        ({"newline": "end"}, "needs a special named 'newline', specials are ()"),
        ({"control": ("<img>",)}, "Format.control is .* two names or none"),
        (
            {"layout": "frames", "specials": ("faster",), "fast_every": 2},
            "slow and fast frames need newline 'row'",
        ),
        ({"layout": "tiles", "max_tiles": 4}, "the cap needs unpad"),
    ],
)
def test_bad_formats_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Format(**settings)


def test_grids_of_another_tiling_are_refused():
    with pytest.raises(ValueError, match="2 token grids for 3 views"):
        arrange(strategy("anyres")(100, 300), [(2, 2)] * 2, NEXT)
