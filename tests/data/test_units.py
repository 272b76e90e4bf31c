"""Units against the original connectors' outputs and torch's pooling; coordinates of encoders."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlmjax.data import units
from vlmjax.data.coords import bucket_coords, buckets, table_coords
from vlmjax.data.strategies import strategy
from vlmjax.data.views import render, sample_matrix


def gather(features, u):
    """f32[U, G, C] of features [patches, C]: zeros where there is no patch."""
    return np.where(u.index[..., None] >= 0, features[u.index], 0)


def weigh(features, u):
    """f32[U, C]: the weighted sum of each unit."""
    return np.einsum("ug,ugc->uc", u.weights, gather(features, u))


def as_map(features, h, w):
    return torch.from_numpy(features.T.reshape(1, -1, h, w))


def close(found, expected, rel=2e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= rel * np.abs(expected).max()


KINDS = ("weight", "bias")


def project(x, scale, shift, w1, b1, w2, b2):
    """LayerNorm, Linear, GELU, Linear of units f32[U, G, C] with their patches side by side."""
    x = torch.from_numpy(x.reshape(len(x), -1))
    x = F.layer_norm(x, x.shape[-1:], scale, shift, 1e-5)
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2).numpy()


@pytest.mark.parametrize("version, order", [("v1", "column"), ("v2", "row")])
def test_golden_pixel_shuffle(golden, version, order):
    z, _ = golden("pixel_shuffle")
    grids = z["in/grid"]
    (patches,) = units.view_maps([grids.shape[1:3]])
    u = units.windows(patches, 2, order=order)
    expected = z[f"out/grid_{version}"]
    for features, shuffled in zip(grids, expected, strict=True):
        found = gather(features.reshape(-1, features.shape[-1]), u)
        np.testing.assert_array_equal(found.reshape(shuffled.shape), shuffled)
    assert u.grids == (expected.shape[1:3],)


@pytest.mark.parametrize("version, order", [("v1", "column"), ("v2", "row")])
def test_golden_pixel_shuffle_and_mlp(golden, version, order):
    z, meta = golden("pixel_shuffle")
    side = meta["config"]["grid_side"]
    u = units.windows(units.view_maps([(side, side)], prefix=1)[0], 2, order=order)
    w = {k[7:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("w/")}
    for tokens, expected in zip(z["in/vit_tokens"], z[f"out/tokens_{version}"], strict=True):
        close(
            project(gather(tokens, u), *(w[f"{k}.{v}"] for k in (0, 1, 3) for v in KINDS)), expected
        )


@pytest.mark.parametrize("side", [5, 7])
def test_golden_downsample_of_odd_grids(golden, side):
    """VILA's mlp_downsample: zeros on the right and below, then 2x2 windows."""
    z, _ = golden("vila")
    u = units.windows(units.view_maps([(side, side)])[0], 2)
    pre = "w/mlp_downsample.layers."
    w = {k[len(pre) :]: torch.from_numpy(z[k]) for k in z.files if k.startswith(pre)}
    for tokens, expected in zip(z[f"in/x_{side}"], z[f"out/mlp_downsample_{side}"], strict=True):
        close(
            project(gather(tokens, u), *(w[f"{k}.{v}"] for k in (1, 2, 4) for v in KINDS)), expected
        )


@pytest.mark.parametrize("target", [0, 1])
def test_golden_s2(golden, target):
    """Scales cut into tiles, stitched, resized by area to one grid, channels concatenated."""
    z, meta = golden("vila")
    c = meta["config"]
    side, scales, patch = c["s2_max_split_size"], c["s2_scales"], c["s2_patch"]
    tiling = strategy("s2", side=side, scales=scales)(99, 41)
    weight, bias = z["w/s2_patch.weight"], z["w/s2_patch.bias"]
    for pixels, expected in zip(z["in/s2_image"], z[f"out/s2_to{target}"], strict=True):
        features = []
        for view in tiling.views:
            x = pixels  # already the largest scale, which `render` would round to whole levels
            for name, value in view.ops:
                if name == "sample":
                    rows, columns = (
                        sample_matrix(n, m) for n, m in zip(x.shape[1:], value, strict=True)
                    )
                    x = np.einsum("hi,wj,cij->chw", rows, columns, x)
                elif name == "crop":
                    top, left, h, w = value
                    x = x[:, top : top + h, left : left + w]
            n = side // patch
            x = x.reshape(3, n, patch, n, patch).transpose(1, 3, 0, 2, 4).reshape(n * n, -1)
            features.append(x @ weight.reshape(len(weight), -1).T + bias)
        maps = units.view_maps([(side // patch, side // patch)] * len(tiling.views))
        maps = units.stitch_groups(maps, tiling.maps)
        scaled = [units.area(m, maps[target].shape) for m in maps]
        found = [weigh(np.concatenate(features), u) for u in scaled]
        close(np.concatenate(found, 1), expected)


def test_golden_sva_masks(golden):
    z, meta = golden("sva")
    c = meta["config"]
    q = c["query_side"]
    for k, (width, height) in enumerate(z["in/image_sizes"].tolist()):
        maps = [units.view_maps([(n, n)])[0] for n in c["tower_sides"]]
        for tower, u in enumerate(units.sva(maps, q, (height, width))):
            expected = z[f"out/mask_{tower}"].reshape(-1, q * q, c["windows"][tower] ** 2)[k]
            np.testing.assert_array_equal(u.mask.reshape(expected.shape), expected)
            assert sorted(u.index[0]) == list(range(c["tower_sides"][tower] ** 2))


def test_golden_buckets(golden):
    z, meta = golden("slices_uhd")
    side = meta["config"]["bucket_table_side"]
    for n, expected in enumerate(z["out/buckets"], 1):
        np.testing.assert_array_equal(buckets(n, side), expected[:n])
    assert bucket_coords((2, 3), side).tolist() == [
        [0, 0],
        [0, 23],
        [0, 46],
        [35, 0],
        [35, 23],
        [35, 46],
    ]


@pytest.mark.parametrize("n", [71, 78, 137, 210])
def test_more_patches_than_places_share_them(n):
    """As in an elongated picture; torch's bucketize gives the same."""
    found = buckets(n, 70)
    assert set(found) == set(range(70)) and (np.diff(found) >= 0).all()
    assert np.abs(found - np.arange(n) * 70 // n).max() <= 1


def test_buckets_of_transformers():
    """Idefics2 multiplies where the original steps; known to differ at 49 and 58 patches."""
    differ = []
    boundaries = torch.arange(1 / 70, 1.0, 1 / 70)
    for n in range(1, 71):
        places = torch.arange(n, dtype=torch.float32) * (1.0 / torch.tensor(n))
        expected = torch.bucketize(places.clamp(max=1.0 - 1e-6), boundaries, right=True).numpy()
        np.testing.assert_array_equal(buckets(n, 70, "transformers"), expected)
        if (buckets(n, 70) != expected).any():
            differ.append(n)
    assert differ == [49, 58]


def test_table_coords_are_those_of_interpolate():
    """A table that holds its own coordinates, resized linearly, shows them inside the edges."""
    ramp = torch.arange(16.0).reshape(1, 1, 16, 1).expand(1, 1, 16, 16)
    shown = F.interpolate(ramp, size=(11, 16), mode="bilinear", align_corners=False)[0, 0]
    found = table_coords((11, 16), 16).reshape(11, 16, 2)
    np.testing.assert_allclose(found[..., 0], shown, atol=1e-5)
    np.testing.assert_array_equal(found[0, :, 1], np.arange(16))


@pytest.mark.parametrize("shape", [(5, 5), (8, 6), (9, 14), (3, 2)])
def test_resampling_is_that_of_torch(shape):
    rng = np.random.default_rng(0)
    h, w = shape
    features = rng.standard_normal((h * w, 4)).astype(np.float32)
    x = as_map(features, h, w)
    (patches,) = units.view_maps([shape])

    def compare(u, expected):
        found = weigh(features, u)
        assert u.grids == (tuple(expected.shape[2:]),) and len(found) == np.prod(u.grids[0])
        # torch computes its places in float32
        np.testing.assert_allclose(found.T.reshape(expected.shape), expected, atol=5e-6)

    for size in [(4, 4), (7, 3), (13, 9), shape]:
        compare(units.area(patches, size), F.adaptive_avg_pool2d(x, size))
        resized = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        compare(units.bilinear(patches, size), resized)
    compare(units.average(patches, 2), F.avg_pool2d(x, 2))
    half = F.interpolate(x, size=(-(-h // 2), -(-w // 2)), mode="bilinear", align_corners=False)
    compare(units.ceil_bilinear(patches, 2), half)
    u = units.maximum(patches, 2)
    found = gather(features, u).max(1).T
    np.testing.assert_array_equal(found.reshape(4, h // 2, w // 2), F.max_pool2d(x, 2)[0])


def test_windows_cover_each_patch_once():
    for h, w, side in [(4, 6, 2), (5, 7, 2), (9, 10, 3), (1, 1, 4)]:
        (patches,) = units.view_maps([(h, w)])
        for order in units.ORDERS:
            u = units.windows(patches, side, order=order)
            assert sorted(u.index[u.index >= 0]) == list(range(h * w))
            assert len(u.index) == np.prod(u.grids[0])
        kept = units.windows(patches, side, padding="floor").index
        assert kept.size == (h // side) * (w // side) * side**2 and (kept >= 0).all()


def test_join_keeps_maps_apart():
    maps = units.view_maps([(2, 2), (3, 4)])
    u = units.join(units.whole(m) for m in maps)
    assert u.index.shape == (2, 12) and u.sizes.tolist() == [[2, 2], [3, 4]]
    assert u.index[0].tolist() == [0, 1, 2, 3] + [-1] * 8
    u = units.join(units.area(m, (2, 2)) for m in maps)
    assert u.grids == ((2, 2), (2, 2)) and np.allclose(u.weights.sum(1), 1)


def test_shifted_and_unpooled_units():
    maps = units.view_maps([(2, 2), (3, 3)])
    u = units.shifted(units.join([units.unpooled(maps[0]), units.area(maps[1], (2, 2))]), 10)
    assert u.index[:4, 0].tolist() == [10, 11, 12, 13] and (u.index[:4, 1:] == -1).all()
    assert u.index[4].tolist() == [14, 15, 17, 18] and np.allclose(u.weights.sum(1), 1)
    assert units.unpooled(maps[0], weighted=False).weights is None


def test_sva_refuses_towers_without_windows():
    with pytest.raises(ValueError, match="27x27 has no equal windows for 24x24"):
        units.query_major(np.zeros((27, 27)), 24)


def test_sample_is_torch_bicubic():
    image = np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)
    tiling = strategy("s2", side=8, scales=(8, 16, 32))(32, 24)
    squeezed = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    x = torch.from_numpy(squeezed.copy()).permute(2, 0, 1)[None].float()
    small = F.interpolate(x, size=(8, 8), mode="bicubic", align_corners=False)[0]
    expected = small.round().clamp(0, 255).permute(1, 2, 0).numpy()
    views = render(Image.fromarray(image), tiling)
    assert len(views) == 1 + 4 + 16 and np.abs(views[0] - expected).max() <= 1
    np.testing.assert_array_equal(views[5], squeezed[:8, :8])
