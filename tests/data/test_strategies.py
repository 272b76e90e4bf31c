"""Resolution strategies against the tables made with the original code, and as properties."""

import numpy as np
import pytest
from PIL import Image

from vlmjax.data.anyres import cap, fit, select_canvas, unpad
from vlmjax.data.strategies import strategy
from vlmjax.data.views import render

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
