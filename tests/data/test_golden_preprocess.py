"""Resize rule, patch rows and DiffFP masks against the files made with the original code."""

import numpy as np
import pytest
from PIL import Image

from vlmjax.data import diffp
from vlmjax.data.resize import Clip, patch_rows, resize_videollama3


def normalised(rows):
    return rows.astype(np.float32) / 127.5 - 1


def test_golden_sizes_of_one_clip(golden):
    z, meta = golden("videollama3_pre")
    for (width, height, frames, merge, most), size in zip(
        z["in/cases"].tolist(), z["out/size"].tolist(), strict=True
    ):
        clip = Clip(height, width, frames, merge)
        limits = dict(min_tokens=meta["config"]["min_tokens"], max_tokens=most)
        assert resize_videollama3([clip], patch=14, **limits) == [tuple(size)]


def test_golden_sizes_share_the_budget(golden):
    z, _ = golden("videollama3_pre")
    for (*sides, merge, most), sizes in zip(
        z["in/multi_cases"].tolist(), z["out/multi_size"].tolist(), strict=True
    ):
        clips = [Clip(sides[k + 1], sides[k], 1, merge) for k in (0, 2, 4)]
        found = resize_videollama3(clips, patch=14, min_tokens=16, max_tokens=most)
        assert found == [tuple(s) for s in sizes]


def test_golden_sizes_of_mixed_merges(golden):
    z, _ = golden("videollama3_pre")
    for (vw, vh, frames, iw, ih, most), sizes in zip(
        z["in/mixed_cases"].tolist(), z["out/mixed_size"].tolist(), strict=True
    ):
        clips = [Clip(vh, vw, frames, 2), Clip(ih, iw, 1, 1)]
        found = resize_videollama3(clips, patch=14, min_tokens=16, max_tokens=most)
        assert found == [tuple(s) for s in sizes]


@pytest.mark.parametrize("merge", [1, 2])
def test_golden_image_rows(golden, merge):
    z, meta = golden("videollama3_pre")
    _, h, w = z[f"out/grid_m{merge}"].tolist()
    rows = patch_rows(Image.fromarray(z["in/image"]), (h * 14, w * 14), 14, merge)
    np.testing.assert_allclose(normalised(rows), z[f"out/rows_m{merge}"], atol=1e-5)


def test_golden_processor_image(golden, make_processor):
    z, meta = golden("videollama3_pre")
    for merge in (1, 2):
        part = {"type": "image", "image": z["in/image"]}
        budget = meta["config"]["image_max_tokens"]
        process = make_processor(image_merge=merge, max_visual_tokens=budget)
        (item,) = process.prompt([{"role": "user", "content": [part]}]).items
        assert (1, *item.grid) == tuple(z[f"out/grid_m{merge}"])
        np.testing.assert_allclose(normalised(item.patches), z[f"out/rows_m{merge}"], atol=1e-5)


def test_golden_processor_video(golden, make_processor):
    z, meta = golden("videollama3_pre")
    part = {"type": "video", "video": z["in/frames"], "timestamps": [0.0, 1.0]}
    process = make_processor(max_visual_tokens=meta["config"]["video_max_tokens"])
    with pytest.raises(ValueError, match="visual tokens needed: 40 .*max_visual_tokens is 30"):
        process.prompt([{"role": "user", "content": [part]}])
    t, h, w = z["out/grid_video"].tolist()
    rows = [patch_rows(Image.fromarray(f), (h * 14, w * 14), 14, 2) for f in z["in/frames"]]
    assert len(rows) == t
    np.testing.assert_allclose(normalised(np.concatenate(rows)), z["out/rows_video"], atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_golden_diffp_masks(golden, number):
    z, meta = golden("diffp")
    video, config = z[f"in/video_{number}"], meta["config"]
    merge = config["merge"]
    rows = [patch_rows(Image.fromarray(f), f.shape[:2], config["patch"], merge) for f in video]
    masks = diffp.keep_masks(rows, merge, config["threshold"], config["min_tokens"])
    np.testing.assert_array_equal(masks, z[f"out/mask_{number}"])
    custom = config["custom"]
    masks = diffp.keep_masks(rows, merge, custom["threshold"], custom["min_tokens"])
    np.testing.assert_array_equal(masks, z[f"out/mask_custom_{number}"])
    for k in range(1, len(rows)):
        scores = diffp.change_scores(rows[k - 1], rows[k], merge)
        np.testing.assert_allclose(scores, z[f"out/score_{number}"][k], atol=1e-4)
        one = diffp.next_mask(rows[k - 1], rows[k], merge)
        np.testing.assert_array_equal(one, z[f"out/mask_{number}"][k])


def test_golden_diffp_through_the_processor(golden, make_processor):
    z, meta = golden("diffp")
    video = z["in/video_0"]
    times = [float(k) for k in range(len(video))]
    messages = [
        {"role": "user", "content": [{"type": "video", "video": video, "timestamps": times}]}
    ]
    sample = make_processor(min_visual_tokens=1).prompt(messages)
    np.testing.assert_array_equal([i.keep for i in sample.items], z["out/mask_0"])
    assert sample.visual.sum() == z["out/mask_0"].sum()
    stream = [
        {"role": "stream", "content": [{"type": "image", "image": frame, "time": time}]}
        for frame, time in zip(video, times, strict=True)
    ]
    stream.insert(3, {"role": "assistant", "content": "It moves."})
    streamed = make_processor(min_visual_tokens=1)({"id": "s", "messages": stream})
    np.testing.assert_array_equal([i.keep for i in streamed.items], z["out/mask_0"])
    whole = make_processor(min_visual_tokens=1, compression=False).prompt(messages)
    assert whole.visual.sum() == z["out/mask_0"].size
