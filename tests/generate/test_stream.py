"""Streaming: one frame at a time into the cache = the whole conversation at once."""

import numpy as np
import pytest

from vlmjax.data.sample import Sample
from vlmjax.generate import stream as module
from vlmjax.generate.stream import Stream

SIDE, FRAMES = 56, 5  # 56 pixels are 4 visual tokens


def _frames():
    """Noise in which quarters change; frame 2 is frame 1 again."""
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8), FRAMES, 0)
    frames[1:, 28:, :28] = rng.integers(0, 256, (28, 28, 3))
    frames[3] = rng.integers(0, 256, (SIDE, SIDE, 3))
    frames[4] = frames[3]
    frames[4, :, 28:] //= 2
    return frames


def _frame(image, time):
    part = {"type": "image", "image": image, "time": time}
    return {"role": "stream", "content": [part]}


def _conversation():
    messages = [{"role": "user", "content": "tell me"}]
    messages += [_frame(image, time / 2) for time, image in enumerate(_frames())]
    messages.insert(4, {"role": "assistant", "content": "one"})
    return messages


def _whole(vlm, messages, tokens=None):
    """The sample of a conversation, or of its media among other tokens."""
    sample = vlm.processor({"id": "whole", "messages": messages})
    if tokens is None:
        return sample
    tokens = np.asarray(tokens, np.int32)
    visual = tokens == vlm.tokenizer.id(vlm.processor.config.video_token)
    return Sample("whole", tokens, np.full_like(tokens, -100), sample.items, visual)


def _close(ours, theirs):
    return np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def _stay_silent(monkeypatch):
    monkeypatch.setattr(Stream, "margin", property(lambda self: -1.0))


@pytest.mark.parametrize("chunk", [256, 16])
def test_stream_equals_the_whole_conversation(vlm, monkeypatch, chunk):
    _stay_silent(monkeypatch)
    monkeypatch.setattr(module, "CHUNK", chunk)
    stream, found = vlm.stream(capacity=300), {}
    for message in _conversation():
        if message["role"] == "stream":
            (part,) = message["content"]
            assert stream.add_frame(part["image"], part["time"]) is None
        else:
            stream.add_message(message["role"], message["content"])
        found[len(stream.tokens) - 1] = stream.scores
    whole = _whole(vlm, _conversation())
    assert [int(i.keep.sum()) for i in whole.items] == [4, 1, 1, 4, 2]
    assert stream.tokens == whole.tokens.tolist()
    scores = vlm.generator.logits(whole)
    assert _close(np.stack(list(found.values())), scores[list(found)])
    assert stream.num_frames == FRAMES


def test_frames_share_one_program_whatever_is_pruned(vlm, monkeypatch):
    _stay_silent(monkeypatch)
    before = module.encode._cache_size()
    stream = vlm.stream(capacity=300)
    for time, image in enumerate(_frames()):
        stream.add_frame(image, time)
    assert module.encode._cache_size() <= before + 1


@pytest.mark.parametrize("finish", ["length", "stop"])
def test_the_model_waits_or_speaks(vlm, finish):
    stream = vlm.stream(capacity=300, max_new_tokens=6)
    messages, frames, answers = [], _frames(), 0
    if finish == "stop":  # what the first answer would hold otherwise
        probe = vlm.stream(capacity=300, max_new_tokens=6)
        probe.add_frame(frames[0], 0)
        probe.reply()
        stream.stop_ids = np.array(probe.tokens[-5:-4], np.int32)
    wait, speak = map(vlm.tokenizer.id, ("<|stream_start|>", "<|im_start|>"))
    for time, image in enumerate(frames[:3]):
        start = len(stream.tokens)
        answer = stream.add_frame(image, time)
        messages.append(_frame(image, time))
        end = stream.tokens.index(vlm.tokenizer.id("<|stream_end|>"), start) + 2
        scores = vlm.generator.logits(_whole(vlm, messages, stream.tokens))
        assert (answer is not None) == (scores[end - 1, speak] > scores[end - 1, wait])
        assert _close(stream.scores, scores[-1])
        if answer is None:
            answer, end = stream.reply(), len(stream.tokens[:end])
            scores = vlm.generator.logits(_whole(vlm, messages, stream.tokens))
        header = [speak, *b"assistant\n"]
        assert stream.tokens[end : end + len(header)] == header
        ids = stream.tokens[end + len(header) : -2]
        assert len(ids) == 6 or finish == "stop"
        assert vlm.tokenizer.decode(ids) == answer
        assert stream.tokens[-2:] == [vlm.tokenizer.id("<|im_end|>"), *b"\n"]
        first = end + len(header) - 1
        assert scores[first : first + len(ids)].argmax(-1).tolist() == ids  # greedy
        assert _close(stream.scores, scores[-1])
        answers += len(ids) < 6
    assert stream.num_answers == 3 and bool(answers) == (finish == "stop")


def test_what_does_not_fit_is_refused_and_changes_nothing(vlm, monkeypatch):
    _stay_silent(monkeypatch)
    frames, stream = _frames(), vlm.stream(capacity=60, max_frames=2)
    stream.add_frame(frames[0], 0.0)
    n = len(stream.tokens)
    before = stream.scores
    with pytest.raises(ValueError, match=f"has {n} tokens and the message 59 .*capacity is 60"):
        stream.add_message("user", "a" * 51)
    with pytest.raises(ValueError, match=r"frame 1 is 14x28, the first is 56x56"):
        stream.add_frame(frames[0, :28, :14], 1.0)
    with pytest.raises(ValueError, match="role 'stream' is not allowed"):
        stream.add_message("stream", "a")
    np.testing.assert_array_equal(stream.scores, before)
    stream.add_frame(frames[1], 1.0)
    with pytest.raises(ValueError, match="has 2 frames, max_frames is 2"):
        stream.add_frame(frames[2], 2.0)
    full = vlm.stream(capacity=n + 5)
    full.add_frame(frames[0], 0.0)
    with pytest.raises(ValueError, match=rf"takes at least 14 more, capacity is {n + 5}"):
        full.reply()
    for values in (
        dict(capacity=0),
        dict(max_frames=0),
        dict(max_new_tokens=0),
        dict(capacity=601),
    ):
        with pytest.raises(ValueError, match="{}={} is not allowed".format(*[*values.items()][0])):
            vlm.stream(**values)
    with pytest.raises(ValueError, match="nothing to score"):
        _ = vlm.stream(capacity=60).scores


def test_the_budget_of_a_long_stream_is_shared(vlm):
    """400 visual tokens for 100 frames are 4 each, so a large frame shrinks to 56 x 56."""
    image = np.zeros((280, 280, 3), np.uint8)
    stream = vlm.stream(capacity=300, max_frames=100)
    stream.add_frame(image, 0)
    pad = vlm.tokenizer.id(vlm.processor.config.video_token)
    assert stream.tokens.count(pad) == 4
