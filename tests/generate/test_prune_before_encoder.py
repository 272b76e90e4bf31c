"""prune="before_encoder": the vision tower sees the patches of kept visual tokens only."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from vlmjax.batch import Budget, Form, Patches, TowerForm
from vlmjax.data.mixture import Mixture
from vlmjax.data.pack import check_fits, pack
from vlmjax.data.processor import Processor, ProcessorConfig
from vlmjax.data.reader import Reader
from vlmjax.data.sample import PRUNE, Item, Sample
from vlmjax.data.stream import packed_batches
from vlmjax.data.tokenizer import byte_tokenizer
from vlmjax.generate.chat import Chat
from vlmjax.generate.stream import Stream
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.nn import bind

HEIGHT, WIDTH, MERGE, PATCH = 56, 84, 2, 14  # 2 x 3 windows of 2 x 2 patches


def frames(seed=0, changing=True):
    """u8[4, 56, 84, 3]: two corners change, then nothing, then everything."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (4, HEIGHT, WIDTH, 3), dtype=np.uint8)
    if changing:
        noise[1, :28] = noise[0, :28]
        noise[1, 28:, 28:56] = noise[0, 28:, 28:56]
        noise[2] = noise[1]
    return noise


def record(number, **options):
    clip = {"type": "video", "video": frames(number, **options), "timestamps": range(4)}
    image = {"type": "image", "image": frames(number)[0, :28, :42]}
    content = [clip, image, {"type": "text", "text": "What?" * (1 + number % 3)}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "It."}]
    return {"id": number, "messages": messages}


def processor(prune, **options):
    config = ProcessorConfig(min_visual_tokens=1, max_length=600, prune=prune, **options)
    return Processor(config, byte_tokenizer())


@pytest.fixture(scope="module", params=PRUNE)
def chat(request, weights):
    return Chat(*weights, processor(request.param))


def packed(samples, budget=(256, 320, 128, 4)):
    return pack([samples], Budget(*budget), Form((TowerForm(PATCH),)))


def test_counts_are_of_kept_windows_only():
    after, before = (processor(prune)(record(0)) for prune in PRUNE)
    kept = [int(item.keep.sum()) for item in before.items]
    assert kept == [6, 2, 1, 6, 6]
    np.testing.assert_array_equal(after.tokens, before.tokens)
    np.testing.assert_array_equal(after.labels, before.labels)
    sizes = [24, 8, 4, 24, 6]  # 4 patches to a window of video, 1 to that of an image
    assert [item.num_encoded for item in before.items] == sizes
    assert check_fits(before, Budget(256, 66, 21, 4)) == (len(before.tokens), 66, 21, 0, 0)
    with pytest.raises(ValueError, match=r"102 patches \(row budget 66\)"):
        check_fits(after, Budget(256, 66, 21, 4))
    (_, whole), (_, saved) = packed([after]), packed([before])
    changed = dict(patches=(66,), patch_pairs=(sum(n * n for n in sizes),), patch_fill=66 / 320)
    assert (whole.patches, whole.patch_pairs) == ((102,), (4 * 24**2 + 6**2,))
    assert saved == dataclasses.replace(whole, **changed)


def test_layout_keeps_places_in_the_frame():
    sample = processor("before_encoder")(record(0))
    batch, _ = packed([sample, sample])
    np.testing.assert_array_equal(
        batch.patches[0].segments[0, :133],
        np.repeat([*range(1, 11), 0], [24, 8, 4, 24, 6, 24, 8, 4, 24, 6, 1]),
    )
    at = 24  # second frame: its windows (1, 0) and (1, 2)
    corner = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    want = np.concatenate([corner + [2, 0], corner + [2, 4]])
    np.testing.assert_array_equal(batch.patches[0].coords[0, at : at + 8], want)
    np.testing.assert_array_equal(batch.units[0].index[0, 6:8], at + np.arange(8).reshape(2, 4))
    pixels = frames()[1].reshape(4, PATCH, 6, PATCH, 3).transpose(0, 2, 4, 1, 3)
    rows = pixels[tuple(want.T)].reshape(8, -1)
    np.testing.assert_array_equal(batch.patches[0].pixels[0, at : at + 8], rows)
    np.testing.assert_array_equal(batch.units[0].index[0, 21:27], 66 + batch.units[0].index[0, :6])


def test_a_frame_without_tokens_leaves_no_segment():
    keep = np.array([[True, True], [False, False], [False, True]])
    items = tuple(
        Item(np.full((8, 12), n, np.uint8), (2, 4), 2, k, "before_encoder")
        for n, k in enumerate(keep)
    )
    tokens = np.arange(5, dtype=np.int32)
    sample = Sample("s", tokens, tokens, items, np.array([1, 1, 0, 1, 0], bool))
    batch, stats = pack([[sample]], Budget(8, 16, 8, 4), Form((TowerForm(2),)))
    np.testing.assert_array_equal(batch.patches[0].segments[0], [1] * 8 + [2] * 4 + [0] * 4)
    np.testing.assert_array_equal(batch.patches[0].pixels[0, :, 0], [0] * 8 + [2] * 4 + [0] * 4)
    assert (stats.visual, stats.visual_before_pruning, stats.patches) == (3, 6, (12,))


def test_nothing_pruned_is_the_same_batch_and_logits(weights):
    samples = [processor(prune)(record(1, changing=False)) for prune in PRUNE]
    for a, b in zip(*(jax.tree.leaves(packed([s])[0]) for s in samples), strict=True):
        np.testing.assert_array_equal(a, b)
    model = Chat(*weights, processor("before_encoder")).generator
    np.testing.assert_array_equal(*(model.logits(s) for s in samples))


def test_equals_the_tower_on_the_kept_patches_of_each_frame(chat):
    """Unpacked and frame by frame, with coordinates and windows written out."""
    prune, generator = chat.processor.config.prune, chat.generator
    model = bind(generator.graphdef, generator.params)
    sample = chat.processor(record(2))
    batch, _ = packed([sample])
    visual = np.asarray(model.encode(jax.tree.map(np.asarray, batch)).tokens)[0]
    row, column = np.mgrid[:4, :6]
    at = 0
    for item in sample.items[:4]:
        windows = (row // 2 * 3 + column // 2).ravel()  # of each patch in reading order
        order = np.argsort(windows, kind="stable")  # window after window
        inside = item.keep[windows[order]] | (prune == "after_encoder")
        coords = np.stack([row.ravel()[order], column.ravel()[order]], -1)[inside]
        features = model.vision(
            Patches(
                item.patches[inside][None],
                np.ones((1, len(coords)), np.int32),
                coords[None].astype(np.int32),
            ),
            attention=AttentionSpec("ref"),
        )[0]
        shown = windows[order][inside]
        for window in np.flatnonzero(item.keep):
            inside = features[shown == window][None, None]
            want = model.connector((inside,), (np.ones(inside.shape[:3], bool),))[0, 0, 0]
            np.testing.assert_allclose(visual[at], want, atol=1e-5 * np.abs(want).max())
            at += 1
    assert at == 15


def test_the_switch_changes_what_a_pruned_video_is(weights):
    generator = Chat(*weights, processor("before_encoder")).generator
    after, before = (generator.logits(processor(prune)(record(2))) for prune in PRUNE)
    assert np.abs(after - before).max() > 1e-3 * np.abs(after).max()


def test_streaming_equals_the_whole_video(chat, monkeypatch):
    monkeypatch.setattr(Stream, "margin", property(lambda self: -1.0))
    stream, scores, messages = chat.stream(capacity=300), {}, []
    for time, image in enumerate(frames(3)):
        stream.add_frame(image, time)
        scores[len(stream.tokens) - 1] = stream.scores
        part = {"type": "image", "image": image, "time": time}
        messages.append({"role": "stream", "content": [part]})
    whole = chat.processor({"id": "whole", "messages": messages})
    assert stream.tokens == whole.tokens.tolist()
    assert [int(i.keep.sum()) for i in whole.items] == [6, 2, 1, 6]
    want = chat.generator.logits(whole)[list(scores)]
    np.testing.assert_allclose(list(scores.values()), want, atol=1e-5 * np.abs(want).max())


def test_a_frame_without_tokens_streams_as_text(weights, monkeypatch):
    monkeypatch.setattr(Stream, "margin", property(lambda self: -1.0))
    stream = Chat(*weights, processor("before_encoder", min_kept=0)).stream(capacity=300)
    stream.add_frame(frames()[0], 0)
    before = len(stream.tokens)
    stream.add_frame(frames()[0], 1)
    text = stream.tokenizer.decode(stream.tokens[before:], skip_special=False)
    assert text == "<|stream_start|>stream\nTime 1.0s: \n<|stream_end|>\n"


def test_packing_holds_more_and_resumes_exactly():
    def stream(prune, position=None):
        records = type("Records", (), {"__getitem__": lambda self, n: record(n)})()
        process = functools.partial(processor(prune).__call__)
        batches = packed_batches(
            Mixture([None], [1.0], seed=0),
            Reader(("records",), [records], [process]),
            [Budget(1024, 220, 220, 4)],
            2,
            pool=8,
            form=Form((TowerForm(PATCH),)),
            normalisation="token",
            position=position,
        )
        return [next(batches) for _ in range(4)]

    after, before = map(stream, PRUNE)
    assert sum(b.stats.samples for b in after) == 16  # 2 of 102 patches a row
    assert sum(b.stats.samples for b in before) == 24  # 3 of 66
    resumed = stream("before_encoder", before[1].position)
    for a, b in zip(before[2:], resumed, strict=False):
        assert a.ids == b.ids and a.position == b.position
        for x, y in zip(*map(jax.tree.leaves, (a.batch, b.batch)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_unknown_places_are_refused():
    with pytest.raises(ValueError, match="prune is 'inside': use one of .*before_encoder"):
        ProcessorConfig(prune="inside")
