"""Resolution strategies against the tables made with the original code, and as properties."""

import pickle
import time

import numpy as np
import pytest
from PIL import Image
from tiling_chain import gradient

from vlmjax.data.anyres import cap, fit, select_canvas, unpad
from vlmjax.data.resize import RULES, Clip
from vlmjax.data.strategies import STRATEGIES, Plan, strategy
from vlmjax.data.views import render

SIX = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
SIDE = {"default": (336, 24, 0), "max9": (384, 27, 9), "custom": (224, 16, 4)}


def swap(size):
    return [size[1], size[0]]


@pytest.mark.parametrize("name", SIDE)
def test_golden_anyres_table(golden, name):
    z, meta = golden("anyres")
    side, unit, most = SIDE[name]
    pinpoints = meta["config"][f"pinpoints_{name}_wh"]
    tile = strategy("anyres", side=side, pinpoints=pinpoints)
    for n, (width, height) in enumerate(z["in/sizes"].tolist()):
        tiling = tile(width, height)
        canvas = select_canvas(width, height, pinpoints)
        assert swap(canvas) == z[f"out/best_{name}"][n].tolist()
        assert tiling.grid == (canvas[0] // side, canvas[1] // side)
        (_, size), (_, padded, place, colour), *_ = tiling.views[-1].ops
        assert padded == canvas and colour == (0, 0, 0) and size == fit(width, height, canvas)
        assert swap(size) == z[f"out/resized_{name}"][n].tolist()
        assert swap(place) == z[f"out/paste_{name}"][n].tolist()
        rows, columns = left = unpad([g * unit for g in tiling.grid], tiling.size)[2:]
        assert list(left) == z[f"out/unpad_{name}"][n].tolist()
        if most:
            rows, columns = cap(left, most, unit)
            assert [rows, columns] == z[f"out/final_{name}"][n].tolist()
        assert unit**2 + rows * (columns + 1) == z[f"out/tokens_{name}"][n]
        assert len(tiling.views) == 1 + tiling.grid[0] * tiling.grid[1]


@pytest.mark.parametrize("most", [6, 12, 40])
def test_golden_dynamic_table(golden, most):
    z, _ = golden("tiles_internvl")
    tile = strategy("dynamic", max_tiles=most)
    for n, size in enumerate(z["in/sizes"].tolist()):
        tiling = tile(*size)
        assert swap(tiling.grid) == z[f"out/grid_{most}"][n].tolist()
        assert len(tiling.views) == z[f"out/tiles_{most}"][n] == z[f"out/tokens_{most}"][n] // 256
        assert tiling.whole == len(tiling.views) - 1


def test_golden_dynamic_pixels(golden):
    z, meta = golden("tiles_internvl")
    tile = strategy("dynamic", side=meta["config"]["small"]["image_size"], max_tiles=6)
    image = Image.fromarray(z["in/small_image"])
    np.testing.assert_array_equal(render(image, tile(*image.size)), z["out/small_tiles"])


@pytest.mark.parametrize("name", ["default", "other"])
def test_golden_uhd_table(golden, name):
    z, meta = golden("slices_uhd")
    c = meta["config"][name]
    tile = strategy(
        "uhd",
        side=c["scale_resolution"],
        patch=c["patch_size"],
        max_slices=c["max_slice_nums"],
    )
    for n, size in enumerate(z["in/sizes"].tolist()):
        tiling = tile(*size)
        whole, *slices = tiling.views
        assert swap(whole.size) == z[f"out/thumb_{name}"][n].tolist()
        assert swap(tiling.grid or (0, 0)) == z[f"out/grid_{name}"][n].tolist()
        assert swap(slices[0].size if slices else (0, 0)) == z[f"out/slice_{name}"][n].tolist()
        refined = slices[0].ops[0][1] if slices else (0, 0)
        assert swap(refined) == z[f"out/refine_{name}"][n].tolist()
        assert 64 * len(tiling.views) == z[f"out/tokens64_{name}"][n]


def test_golden_uhd_pixels(golden):
    z, meta = golden("slices_uhd")
    c = meta["config"]["small"]
    tile = strategy("uhd", side=c["scale_resolution"], patch=c["patch_size"])
    image = Image.fromarray(z["in/small_image"])
    tiling = tile(*image.size)
    whole, *slices = render(image, tiling)
    np.testing.assert_array_equal(whole, z["out/small_thumb"])
    np.testing.assert_array_equal(slices, z["out/small_slices"])
    assert swap(tiling.grid) == z["out/small_grid"].tolist()


def test_square_modes():
    image = gradient(30, 20)
    fill = (1, 2, 3)
    (padded,) = render(image, strategy("square", side=30, fill=fill)(30, 20))
    np.testing.assert_array_equal(padded[5:25], np.asarray(image))
    assert (padded[:5] == fill).all() and (padded[25:] == fill).all()
    (squeezed,) = render(image, strategy("square", side=30, mode="resize")(30, 20))
    expected = image.resize((30, 30), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(squeezed, np.asarray(expected))
    (kept,) = render(image, strategy("square", side=20, mode="crop")(30, 20))
    np.testing.assert_array_equal(kept, np.asarray(image)[:, 5:25])


def test_whole_view_of_grid2x2():
    """Cut from the picture it loses the ends of an elongated one; from the canvas it does not."""
    image = gradient(100, 20)
    cropped = render(image, strategy("grid2x2", side=20)(100, 20))[4]
    np.testing.assert_array_equal(cropped, np.asarray(image)[:, 40:60])
    squeezed = render(image, strategy("grid2x2", side=20, whole="canvas")(100, 20))[4]
    assert squeezed[:, 0, 0].max() < 30 and squeezed[:, -1, 0].min() > 225


def test_uhd_floor_never_exceeds_round():
    rng = np.random.default_rng(2)
    smaller = 0
    for size in rng.integers(20, 2000, (200, 2)).tolist():
        (a, *_), (b, *_) = (strategy("uhd", rounding=r)(*size).views for r in ("floor", "round"))
        assert a.size[0] % 14 == a.size[1] % 14 == 0
        assert a.size[0] <= b.size[0] and a.size[1] <= b.size[1]
        smaller += a.size != b.size
    assert smaller > 50


def test_plan_of_interleave_and_of_several_encoders():
    one, base = strategy("anyres"), strategy("square", side=336)
    plan = Plan(image=(one,), images=(base,))
    assert plan(640, 480) == (one(640, 480),)
    assert plan(640, 480, images=3) == plan(640, 480, video=True) == (base(640, 480),)
    cambrian = [
        strategy("square", side=s, fill=f) for s, f in ((384, (127,) * 3), (1024, (0,) * 3))
    ]
    first, second = Plan(image=tuple(cambrian))(640, 480)
    assert first.views[0].size == (384, 384) and second.views[0].size == (1024, 1024)
    assert first.views[0].ops[0][-1] == (127, 127, 127)


@pytest.mark.parametrize("rule", RULES)
def test_native_is_the_resize_rule_of_one_image(rule):
    tile = strategy("native", rule=rule, merge=2, max_tokens=256)
    for width, height in [(640, 480), (33, 90), (3000, 500)]:
        limits = dict(patch=14, min_tokens=16, max_tokens=256)
        (size,) = RULES[rule]([Clip(height, width, 1, 2)], **limits)
        (view,) = render(gradient(width, height), tile(width, height))
        assert view.shape == (*size, 3)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("tiles", {}, "strategy 'tiles' is unknown: use one of .*'anyres'"),
        ("square", {"sides": 3}, "'square' has no settings .'sides'., it has"),
        ("square", {"mode": "stretch"}, "Square.mode is 'stretch': use one of .'crop'"),
        ("square", {"side": 0}, "Square.side is 0, it must be at least 1"),
        ("anyres", {"side": 100}, "AnyRes.pinpoints .* multiples of side = 100"),
        ("dynamic", {"min_tiles": 13}, "Dynamic.min_tiles is 13, above max_tiles = 12"),
        ("s2", {"scales": (768, 384)}, "S2.scales is .* rising order"),
    ],
)
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        strategy(name, **settings)


def test_images_that_do_not_fit_their_tiling_are_refused():
    with pytest.raises(ValueError, match=r"uint8.8, 9, 3., its tiling was made for uint8.9, 8, 3."):
        render(Image.new("RGB", (9, 8)), strategy("square")(8, 9))


def test_elongated_pictures_have_views():
    """As long as `data.image` lets them in; nothing comes out empty."""
    for name in STRATEGIES:
        for size in [(1, 200), (200, 1), (10, 2000), (2000, 10), (1, 1), (400, 2)]:
            tiling = strategy(name)(*size)
            assert all(min(view.size) >= 1 for view in tiling.views)
            if name != "native" and max(size) < 1000:
                views = render(gradient(*size), tiling)
                assert [v.shape[:2] for v in views] == [v.size for v in tiling.views]


def test_strategies_travel_to_worker_processes():
    plan = Plan(image=(strategy("anyres", pinpoints=[[336, 672], [672, 336]]),))
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan and hash(copy) == hash(plan)
    assert copy(640, 480) == plan(640, 480)


def test_calls_are_fast_and_remembered():
    tilers = [strategy(name) for name in STRATEGIES]
    tilers += [strategy("anyres", side=384, pinpoints=SIX), strategy("dynamic", max_tiles=40)]
    sizes = np.random.default_rng(5).integers(100, 2000, (100, 2)).tolist()
    for tile in tilers:
        tile(500, 500)
        seconds = []
        for size in sizes:
            start = time.process_time()
            tile(*size)
            seconds.append(time.process_time() - start)
        assert np.median(seconds) < 1e-3  # other processes may interrupt a few
        assert tile(*sizes[0]) is tile(*sizes[0])
