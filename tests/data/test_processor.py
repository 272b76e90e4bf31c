"""The processor from record to sample: layout, budgets, streams and refusals."""

import weakref

import numpy as np
import pytest
from numbered_frame import frame_number
from PIL import Image

from vlmjax.batch import Form, TowerForm
from vlmjax.data import annotation, media
from vlmjax.data.grounding import GROUNDING
from vlmjax.data.health import BadRecord
from vlmjax.data.media import Medium
from vlmjax.data.processor import Processor, ProcessorConfig, control_tokens
from vlmjax.data.sample import window_coords
from vlmjax.data.tokenizer import SPECIAL_TOKENS, byte_tokenizer

RNG = np.random.default_rng(1)
IMAGE = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
FRAMES = RNG.integers(0, 256, (3, 56, 84, 3), dtype=np.uint8)


def ask(*parts, answer="Yes."):
    content = [*parts, {"type": "text", "text": "Really?"}]
    messages = [{"role": "user", "content": content}]
    return {
        "id": 7,
        "messages": messages + [{"role": "assistant", "content": answer}] * bool(answer),
    }


def picture(image=IMAGE, **extra):
    return {"type": "image", "image": image, **extra}


def clip(frames=FRAMES, times=(0, 1, 2)):
    return {"type": "video", "video": frames, "timestamps": times}


def test_text_only(make_processor, tokenizer):
    sample = make_processor()(ask())
    text = "<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert tokenizer.decode(sample.tokens, skip_special=False) == text
    trained = sample.labels[sample.labels >= 0]
    assert tokenizer.decode(trained, skip_special=False) == "Yes.<|im_end|>"
    assert sample.id == "7" and sample.items == () and not sample.visual.any()
    assert sample.tokens.dtype == sample.labels.dtype == np.int32


def test_items_follow_the_text(make_processor, tokenizer):
    small = RNG.integers(0, 256, (28, 70, 3), dtype=np.uint8)
    sample = make_processor(min_visual_tokens=1)(ask(picture(), clip(), picture(small)))
    assert [(i.grid, i.merge) for i in sample.items] == [
        ((3, 3), 1),
        *[((4, 6), 2)] * 3,
        ((2, 5), 1),
    ]
    assert [len(i.patches) for i in sample.items] == [9, 24, 24, 24, 10]
    assert sample.visual.sum() == sum(i.keep.sum() for i in sample.items) == 9 + 18 + 10
    ids = sample.tokens[sample.visual]
    image, video = tokenizer.id("<|image_pad|>"), tokenizer.id("<|video_pad|>")
    assert ids.tolist() == [image] * 9 + [video] * 18 + [image] * 10
    assert "Time 0.0s:,Time 1.0s:,Time 2.0s:\n\nReally?" in tokenizer.decode(sample.tokens)


def test_prompt_is_the_start_of_the_record(make_processor):
    process = make_processor()
    whole, record = process(ask(clip(), picture())), ask(clip(), picture(), answer=None)
    prompt = process.prompt(record["messages"])
    np.testing.assert_array_equal(prompt.tokens, whole.tokens[: len(prompt.tokens)])
    assert (prompt.labels == -100).all()
    assert whole.labels[len(prompt.tokens)] == ord("Y")


def test_static_video_keeps_one_token_a_frame(make_processor):
    still = np.repeat(FRAMES[:1], 3, axis=0)
    sample = make_processor(min_visual_tokens=1)(ask(clip(still)))
    assert [i.keep.tolist() for i in sample.items[1:]] == [[True] + [False] * 5] * 2
    assert all(len(i.patches) == 24 for i in sample.items)


def test_video_files_match_their_frames(make_processor, make_video):
    path = make_video("regular_clip.mp4", [40 * k for k in range(90)])
    process = make_processor(min_visual_tokens=1, compression=False)
    sample = process(ask({"type": "video", "video": path}))
    assert [i.grid for i in sample.items] == [(4, 4)] * 3
    large = make_processor(min_visual_tokens=1, patch=16, compression=False)
    sample = large(ask({"type": "video", "video": path}))
    for item, number in zip(sample.items, (24, 49, 74), strict=True):
        windows = item.patches.reshape(2, 2, 2, 2, 3, 16, 16)
        frame = windows.transpose(0, 2, 5, 1, 3, 6, 4).reshape(64, 64, 3)
        assert frame_number(frame) == number
    cut = process(ask({"type": "video", "video": path, "start_time": 1.0, "end_time": 3.0}))
    assert len(cut.items) == 2
    assert len(make_processor(max_frames=2)(ask({"type": "video", "video": path})).items) == 2


def test_stream_annotation_end_to_end(make_processor, make_video, tokenizer):
    path = make_video("long.mp4", [40 * k for k in range(25 * 40)], gop=25)
    record = {
        "stream": True,
        "video": [path.name],
        "start_time": 2.0,
        "end_time": 9.0,
        "conversation": [
            {"role": "user", "content": "Tell me.", "time": 2.0},
            {"role": "assistant", "content": "Now.", "time": 4.5},
        ],
    }
    record = annotation.to_record(record, path.parent, id="s")
    process = make_processor(min_visual_tokens=1)
    sample = process(record)
    text = tokenizer.decode(sample.tokens)
    assert [text.count(f"Time {t}.0s: \n") for t in range(4)] == [1, 1, 1, 0]
    assert len(sample.items) == 3 and all(i.merge == 2 for i in sample.items)
    assert not all(i.keep.all() for i in sample.items)  # compared with the frame before
    decisions = np.isin(
        sample.labels, [tokenizer.id("<|stream_start|>"), tokenizer.id("<|im_start|>")]
    )
    assert decisions.sum() == 2  # of user, stream, speak: one per kind
    np.testing.assert_array_equal(sample.labels, process(record).labels)


def test_settings_of_a_stream_are_those_of_the_processor(make_processor, make_video):
    path = make_video("long.mp4", [40 * k for k in range(25 * 40)], gop=25)
    said = [{"role": "user", "content": "Tell me.", "time": 0.0}]
    said += [{"role": "assistant", "content": "Now.", "time": t} for t in (5.5, 20.5, 30.5)]
    stream = {"stream": True, "video": path.name, "start_time": 1.0, "conversation": said}
    record = annotation.to_record(stream, path.parent, id="s")

    def frames(**config):
        sample = make_processor(min_visual_tokens=1, **config)(record, pixels="blank")
        return len(sample.items), sample.repairs

    assert frames() == (30, {})
    assert frames(fps=0.2) == (6, {})
    with pytest.raises(BadRecord, match="has 30 frames, max_stream_frames is 10") as error:
        frames(max_stream_frames=10)
    assert error.value.reason == "too_long"
    cut = dict(max_stream_frames=10, overlong="cut_at_turns")
    assert frames(**cut) == (5, {"dropped_messages": 2})
    cut |= {"max_stream_frames": 3}
    with pytest.raises(BadRecord) as error:
        frames(**cut)
    assert error.value.reason == "no_answer"


def test_media_are_opened_once_however_often_a_conversation_is_cut(make_processor, monkeypatch):
    rounds = [
        {"role": role, "content": content}
        for k in range(31)
        for role, content in (("user", [clip(), picture(), clip()]), ("assistant", f"It is {k}."))
    ]
    opened, size = [], media.image.image_size
    monkeypatch.setattr(media.image, "image_size", lambda s: opened.append(s) or size(s))
    limits = dict(min_visual_tokens=1, compression=False, max_visual_tokens=200)
    process = make_processor(overlong="cut_at_turns", **limits)
    sample = process({"id": "a", "messages": rounds})
    assert len(opened) == 31
    kept = rounds[: len(rounds) - sample.repairs["cut_messages"]]
    assert 2 < len(kept) < len(rounds)
    alone = make_processor(**limits)({"id": "a", "messages": kept})
    np.testing.assert_array_equal(sample.tokens, alone.tokens)
    for a, b in zip(sample.items, alone.items, strict=True):
        np.testing.assert_array_equal(a.patches, b.patches)


def test_stream_sources_mix(make_processor, tmp_path):
    path = tmp_path / "f.png"
    Image.fromarray(FRAMES[1]).save(path)
    sources = [FRAMES[0], path, Image.fromarray(FRAMES[2])]
    stream = [{"role": "stream", "content": [picture(s, time=k)]} for k, s in enumerate(sources)]
    process = make_processor(min_visual_tokens=1)
    streamed, video = process({"id": "s", "messages": stream}), process(ask(clip()))
    for a, b in zip(streamed.items, video.items, strict=True):
        np.testing.assert_array_equal(a.patches, b.patches)
        np.testing.assert_array_equal(a.keep, b.keep)


@pytest.mark.parametrize(
    "record,match",
    [
        ({"messages": []}, "'id' is missing"),
        ({"id": "x"}, "'messages' is missing"),
        (ask({"type": "image"}), "part of type 'image' has no 'image'"),
        (ask(clip(times=(0, 1))), "3 frames and 2 timestamps"),
        (ask(clip(FRAMES[:0], ())), r"video array is uint8\[0, 56, 84, 3\]"),
        (ask(clip(FRAMES.astype(float))), r"video array is float64"),
        (ask(clip(np.repeat(FRAMES, 61, 0), range(183))), "183 frames, max_frames is 180"),
        (ask(picture("nothing.png")), "'nothing.png' is not a file"),
        (ask(picture(np.zeros((1, 900, 3), np.uint8))), "aspect ratio"),
        (ask(answer="x" * 40000), r"'7' has 4\d+ tokens \(0 visual\), max_length is 32768"),
        (
            {
                "id": "s",
                "messages": [{"role": "stream", "content": [picture(), picture(FRAMES[0])]}],
            },
            "stream frame 1 is 84x56, the first is 40x40",
        ),
        (
            {"id": "s", "messages": [{"role": "stream", "content": [picture()] * 401}]},
            "401 frames, max_stream_frames is 400",
        ),
    ],
)
def test_bad_records_are_refused(make_processor, record, match):
    with pytest.raises(ValueError, match=match):
        make_processor()(record)


@pytest.mark.parametrize("key", ["time", "start_time", "end_time"])
@pytest.mark.parametrize("value", [[1], "1.0", 10**400, float("inf"), float("-inf"), float("nan")])
def test_times_are_finite_numbers(make_processor, key, value):
    with pytest.raises(BadRecord, match=f"has {key} .*: give seconds") as error:
        make_processor()(ask(clip() | {key: value}))
    assert error.value.reason == "malformed"


def test_media_are_files_bytes_or_arrays(make_processor):
    for part in ({"type": "video", "video": {"a": 1}}, picture({"a": 1})):
        with pytest.raises(BadRecord, match="source is a dict; give a path") as error:
            make_processor()(ask(part))
        assert error.value.reason == "malformed"


SQUARE = dict(
    template="vicuna",
    image_token="<|image_pad|>",
    video_token="<|image_pad|>",
    picture=dict(strategy=(dict(name="square", side=28, mode="pad"),)),
)


@pytest.fixture
def make_square(tokenizer):
    """Makes processors of square views instead of native sizes."""
    tokenizer = byte_tokenizer((*SPECIAL_TOKENS, "<s>", "</s>"))
    form = Form((TowerForm(14),))
    return lambda **config: Processor(ProcessorConfig(**SQUARE, **config), tokenizer, form)


@pytest.mark.parametrize("kind", ["native", "square"])
def test_one_decoded_picture_is_held_at_a_time(make_processor, make_square, monkeypatch, kind):
    process = make_square() if kind == "square" else make_processor()
    decoded, alive, frames = [], [], Medium.frames

    def counted(self):
        for frame in frames(self):
            held = frame.copy()
            del frame
            decoded.append(weakref.ref(held))
            alive.append(sum(ref() is not None for ref in decoded))
            yield held
            del held

    monkeypatch.setattr(Medium, "frames", counted)
    process(ask(*[picture()] * 4, clip()))
    assert len(alive) == 7 and max(alive) <= 2


def test_what_is_too_long_is_refused_before_decoding(make_square, monkeypatch):
    assert len(make_square()(ask(*[picture()] * 30)).items) == 30
    monkeypatch.setattr(Medium, "frames", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadRecord, match="max_length is 100"):
        make_square(max_length=100)(ask(*[picture()] * 30))


def test_the_pixels_of_a_record_are_limited(make_processor, monkeypatch):
    monkeypatch.setattr(media, "MAX_PIXELS", 3 * 40 * 40)
    image = Image.fromarray(IMAGE)
    make_processor()(ask(*[picture(image)] * 3, picture(IMAGE), clip()))
    with pytest.raises(BadRecord, match="have 6400 pixels together, at most 4800") as error:
        make_processor()(ask(*[picture(image)] * 4), pixels="blank")
    assert error.value.reason == "hostile_media"


def test_text_is_judged_before_it_is_tokenised(make_processor, tokenizer, monkeypatch):
    process = make_processor(max_length=100)
    longest = len("<|stream_start|>")
    assert tokenizer.longest == longest
    monkeypatch.setattr(type(tokenizer), "encode_text", lambda *_: pytest.fail("tokenised"))
    words = "x" * (100 * longest - len("Really?"))
    with pytest.raises(BadRecord, match=f"says {100 * longest + 1} characters") as error:
        process(ask(answer=words + "x"))
    assert error.value.reason == "too_long"
    with pytest.raises(pytest.fail.Exception, match="tokenised"):
        process(ask(answer=words))


def test_the_deadline_of_videos_is_a_setting(make_processor, make_video):
    path = make_video("regular_clip.mp4", [40 * k for k in range(90)])
    with pytest.raises(BadRecord, match="longer than 1e-09 s .* raise video_deadline"):
        make_processor(video_deadline=1e-9)(ask({"type": "video", "video": path}))
    with pytest.raises(ValueError, match="video_deadline is 0.0"):
        make_processor(video_deadline=0.0)


def test_few_coordinates_are_kept():
    """Pictures in native sizes hardly repeat; one of 16,384 patches takes 131 KB."""
    for height in range(1, 200):
        window_coords(height, 4, 1)
    assert window_coords.cache_info().currsize <= 64


def test_visual_budget(make_processor):
    process = make_processor(max_visual_tokens=40)
    assert process(ask(picture(), picture())).visual.sum() == 32
    with pytest.raises(ValueError, match="visual tokens needed: 48 .*max_visual_tokens is 40"):
        process(ask(*[picture()] * 3))
    own = make_processor(max_visual_tokens=40, resize="transformers")
    assert own(ask(*[picture()] * 3)).visual.sum() == 48
    thin = np.zeros((7, 800, 3), np.uint8)
    with pytest.raises(ValueError, match="1 x 800x7 -> 0 tokens.*every image needs at least 1"):
        make_processor(max_visual_tokens=200)(ask(clip(), picture(thin)))


def test_prompts_must_leave_the_answer_out(make_processor):
    with pytest.raises(ValueError, match="remove the answer"):
        make_processor().prompt(ask()["messages"])


@pytest.mark.parametrize(
    "values,match",
    [
        (dict(resize="nearest"), "resize is 'nearest': use one of"),
        (dict(frame_sampling="x"), "frame_sampling is 'x'"),
        (dict(patch=0), "patch is 0"),
        (dict(fps=0.0), "fps is 0.0"),
    ],
)
def test_bad_configs_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        ProcessorConfig(**values)


def test_templates_of_tokenizers_boxes_and_documents(tmp_path):
    Image.new("RGB", (56, 28)).save(tmp_path / "a.png")
    tokenizer = byte_tokenizer((*SPECIAL_TOKENS, "<ref>", "</ref>", "<box>", "</box>"))
    tokenizer.hf.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    config = ProcessorConfig(template="tokenizer", grounding="internvl", min_visual_tokens=1)
    assert set(GROUNDING["internvl"].controls) <= set(control_tokens(config))
    process = Processor(config, tokenizer)
    boxes = {
        "image": "a.png",
        "boxes": [[14, 7, 28, 28]],
        "image_size": [56, 28],
        "conversations": [
            {"from": "human", "value": "<image>Where? "},
            {"from": "gpt", "value": " At <box>."},
        ],
    }
    sample = process(annotation.to_record(boxes, tmp_path, id="b"))
    said = tokenizer.decode(sample.tokens[~sample.visual], skip_special=False)
    answer = "At <box>[[250, 250, 500, 1000]]</box>.<|im_end|>"
    assert said == f"[user]\nWhere?<|im_end|>[assistant]{answer}"
    assert tokenizer.decode(sample.labels[sample.labels >= 0], skip_special=False) == answer
    assert tokenizer.id("<box>") in sample.labels
    document = {"texts": ["One.", None, "Two."], "images": [None, "a.png", None]}
    sample = process(annotation.to_record(document, tmp_path, id="d"))
    trained = tokenizer.decode(sample.labels[sample.labels >= 0], skip_special=False)
    assert trained == "One.\nTwo.<|im_end|>" and sample.visual.sum() == 8


def test_long_conversations_are_refused_or_cut_at_turns(tmp_path):
    rounds = [
        [
            {"role": "user", "content": f"question {k}?"},
            {"role": "assistant", "content": "yes. " * 4},
        ]
        for k in range(6)
    ]
    messages = sum(rounds, [])
    record = {"id": "a", "messages": messages, "repairs": {"missing_tag": 1}}
    tokenizer = byte_tokenizer()
    whole = Processor(ProcessorConfig(), tokenizer)(record)
    assert whole.repairs == {"missing_tag": 1}
    half = len(whole.tokens) // 2
    with pytest.raises(BadRecord, match="max_length is") as error:
        Processor(ProcessorConfig(max_length=half), tokenizer)(record)
    assert error.value.reason == "too_long"
    cut = Processor(ProcessorConfig(max_length=half, overlong="cut_at_turns"), tokenizer)
    for pixels in ("blank", "decoded"):
        sample = cut(record, pixels=pixels)
        np.testing.assert_array_equal(sample.tokens, whole.tokens[: len(sample.tokens)])
        assert sample.repairs == whole.repairs | {"cut_messages": 6}
        np.testing.assert_array_equal(
            sample.tokens, cut({"id": "a", "messages": messages[:6]}).tokens
        )
    with pytest.raises(BadRecord, match="first round of 12 messages does not fit"):
        Processor(ProcessorConfig(max_length=9, overlong="cut_at_turns"), tokenizer)(record)
