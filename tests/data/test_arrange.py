"""The whole chain on the host, size -> views -> units -> sequence, against the original outputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlmjax.data.anyres import unpad
from vlmjax.data.arrange import Format, arrange, arrange_video
from vlmjax.data.strategies import strategy
from vlmjax.data.templates import VISUAL

NEWLINE = ("image_newline", "faster")
ANYRES = dict(layout="tiles", unpad="original", newline="row", specials=NEWLINE)


def pooled(tokens, pool):
    """f32[V', D]: visual tokens after the pooling that an arrangement asks for."""
    if pool is None:
        return tokens
    there = (pool.index >= 0)[..., None]
    taken = tokens[pool.index]
    if pool.weights is None:
        return np.where(there, taken, -np.inf).max(1)
    return (np.where(there, taken, 0) * pool.weights[..., None]).sum(1)


def assemble(tokens, specials, arrangement):
    """f32[n, D]: the visual pieces of a sequence, as the device will gather them."""
    table = np.concatenate([pooled(tokens, arrangement.pool), specials[::-1]])
    return table[arrangement.entries]


def image_form(case):
    kind = case["mm_patch_merge_type"]
    form = dict(ANYRES)
    if "anyres_max" in case["image_aspect_ratio"]:
        form["max_tiles"] = int(case["image_aspect_ratio"].split("_")[-1])
    if "unpad" not in kind:
        form.update(unpad="none", newline="none")
    if "maxpool2x2" in kind:
        form["pool"] = "max"
    if "nobase" in kind:
        form["base"] = "none"
    if kind == "flat":
        form = dict(layout="flat", specials=NEWLINE)
    return Format(**form)


def video_form(case):
    places = {"grid": "row", "frame": "frame", "one_token": "end", "no_token": "none"}
    return Format(
        layout="frames",
        newline=places[case["mm_newline_position"]],
        pool=case["mm_spatial_pool_mode"],
        stride=case["pool_stride"],
        fast_every=case.get("faster_token_stride", 0),
        specials=NEWLINE,
    )


@pytest.mark.parametrize("number", range(37))
def test_golden_anyres_case(golden, number):
    z, meta = golden("anyres")
    case, features = meta["config"]["cases"][number], z[f"in/case_{number:02}"]
    grids = [(case["tokens_per_side"],) * 2] * len(features)
    if case["modality"] == "video":
        found = arrange(None, grids, video_form(case))
    else:
        tile = strategy("anyres", side=case["tile"], pinpoints=case["pinpoints_wh"])
        if case["image_aspect_ratio"] == "square":  # the original then takes 2x2 tiles, unasked
            tile = strategy("anyres", side=case["tile"], pinpoints=[[2 * case["tile"]] * 2])
        tiling = tile(*case["size_wh"])
        if len(features) == 1:
            tiling = strategy("square", side=case["tile"], mode="resize")(*case["size_wh"])
        assert len(tiling.views) == len(features)
        found = arrange(tiling, grids, image_form(case))
    specials = np.stack([z["w/image_newline"], z["w/faster_token"]])
    tokens = features.reshape(-1, features.shape[-1])
    expected = z[f"out/case_{number:02}"]
    assert len(found.entries) == len(expected)
    np.testing.assert_allclose(assemble(tokens, specials, found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, side, unit, most", [("default", 336, 24, 0), ("max9", 384, 27, 9)])
def test_golden_anyres_counts(golden, name, side, unit, most):
    """The sequence is as long as the table says, and uses each token and row's newline once."""
    z, meta = golden("anyres")
    tile = strategy("anyres", side=side, pinpoints=meta["config"][f"pinpoints_{name}_wh"])
    form = Format(**ANYRES, max_tiles=most)
    for n in range(0, 400, 5):
        tiling = tile(*z["in/sizes"][n].tolist())
        found = arrange(tiling, [(unit, unit)] * len(tiling.views), form)
        assert len(found.entries) == z[f"out/tokens_{name}"][n]
        (piece,) = found.pieces
        used = piece.value[piece.value >= 0]
        assert len(set(used.tolist())) == len(used)
        if found.pool is not None:
            assert used.tolist() == list(range(len(found.pool.index)))
            np.testing.assert_allclose(found.pool.weights.sum(1), 1, atol=1e-6)
        rows = z[f"out/{'final' if most else 'unpad'}_{name}"][n, 0]
        assert (piece.value == -1).sum() == rows


def test_golden_uhd_placeholders(golden):
    z, _ = golden("slices_uhd")
    tile = strategy("uhd")
    for size, expected in zip(z["in/sizes"].tolist(), z["out/placeholders"], strict=False):
        tiling = tile(*size)
        found = arrange(tiling, [(1, 3)] * len(tiling.views), Format(layout="slices"))
        text = "".join(
            "<unk>" * len(p.value) if p.kind == VISUAL else p.value for p in found.pieces
        )
        assert text == expected.removesuffix("\n")  # which the template puts after every picture
        assert found.entries.tolist() == list(range(3 * len(tiling.views)))


def test_golden_cambrian(golden):
    """SVA's queries, projected, unpadded, a newline after each row."""
    z, meta = golden("sva")
    side, at = meta["config"]["query_side"], meta["config"]["image_position"]
    w = {k: torch.from_numpy(z[k]) for k in z.files if k.startswith("w/mm_projector.")}
    form = Format(layout="square", unpad="original", newline="row", specials=("image_newline",))
    tile = strategy("square")
    for k, (width, height) in enumerate(z["in/image_sizes"].tolist()):
        tiling = tile(width, height)
        found = arrange(tiling, [(side, side)], form)
        rows, columns = z["out/grid_after_unpad"][k].tolist()
        assert unpad((side, side), (height, width))[2:] == (rows, columns)
        assert len(found.entries) == rows * (columns + 1)
        x = torch.from_numpy(z["out/queries"][k])
        x = F.gelu(F.linear(x, w["w/mm_projector.0.weight"], w["w/mm_projector.0.bias"]))
        x = F.linear(x, w["w/mm_projector.2.weight"], w["w/mm_projector.2.bias"]).numpy()
        expected = z["out/inputs_embeds"][k, at : at + len(found.entries)]
        values = assemble(x, z["w/image_newline"][None], found)
        assert np.abs(values - expected).max() <= 2e-5 * np.abs(z["out/inputs_embeds"]).max()
        # The training layout of fixed shape masks exactly what is not here.
        masked = z["out/train_attention_mask"][k, at : at + side * (side + 1)]
        kept = np.flatnonzero(masked)
        (piece,) = found.pieces
        slots = np.arange(side * side).reshape(side, side)
        slots = np.pad(slots, ((0, 0), (0, 1)), constant_values=-1).ravel()
        np.testing.assert_array_equal(piece.value, slots[kept])


def test_pooled_frames_are_counted_through():
    """Each of two frames in tiles is what it is alone, behind the tokens of the frame before."""
    tiling = strategy("anyres", side=8, pinpoints=[(32, 32)])(100, 70)
    grids = ((4, 4),) * len(tiling.views)
    form = Format(**ANYRES, max_tiles=2)
    alone = arrange(tiling, grids, form)
    both = arrange_video(tiling, [2 * grids], 2, form)
    tokens = np.random.default_rng(0).normal(size=(2, 16 * len(grids), 3))
    newline = np.zeros((2, 3))
    want = [assemble(frame, newline, alone) for frame in tokens]
    found = assemble(tokens.reshape(-1, 3), newline, both)
    np.testing.assert_allclose(found, np.concatenate(want), atol=1e-6)


@pytest.mark.parametrize("name", ["cogvlm2", "glm4v"])
def test_golden_shared_positions(golden, name):
    z, meta = golden(name)
    form = Format(specials=("boi", "eoi"), vectors=("boi", "eoi"), positions="shared")
    side = meta["config"]["vision"]["image_size"] // meta["config"]["vision"]["patch_size"] // 2
    tiling = strategy("square", side=12, mode="resize")(640, 480)
    found = arrange(tiling, [(side, side)], form)
    assert found.entries.tolist() == [-1, 0, 1, 2, 3, -2]
    for k in range(2):
        expected = z["out/position_ids"][k]
        if name == "cogvlm2":
            start = int(z["in/token_type_ids"][k].argmax())
            end = int(z["in/attention_mask"][k].sum())
        else:
            start = int((z["in/input_ids"][k] == meta["config"]["boi_token_id"]).argmax())
            end = len(expected)
        steps = np.ones(end, int)
        steps[0] = 0
        steps[start : start + len(found.steps)] = found.steps
        np.testing.assert_array_equal(np.cumsum(steps), expected[:end])
