"""Chat rendering, tokens, labels and annotations against files made with the original code."""

import json
from collections import Counter

import numpy as np
import pytest

from vlmjax.data import annotation, chat
from vlmjax.data.timed import interleaved
from vlmjax.data.tokenizer import byte_tokenizer

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<|stream_start|>",
    "<|stream_end|>",
)
TOKENS = dict(image_token="<image>", video_token="<image>")


@pytest.fixture(scope="module")
def golden_tokenizer():
    return byte_tokenizer(SPECIAL)


def conversation(golden, case):
    z, meta = golden("videollama3_text")
    config = meta["config"]["cases"][case]
    counts = [
        (h // m) * (w // m)
        for (t, h, w), m in zip(config["grid_sizes"], config["merge_sizes"], strict=True)
        for _ in range(t)
    ]
    return z, config, json.loads(str(z[f"in/conversation_{case:02d}"])), counts


@pytest.mark.parametrize("case", range(9))
def test_golden_text(golden, case):
    z, _, messages, _ = conversation(golden, case)
    assert chat.render(messages, **TOKENS) == str(z[f"out/text_{case:02d}"])
    prompt = chat.render(messages[:-1], **TOKENS, generation=True)
    assert prompt == str(z[f"out/prompt_{case:02d}"])


@pytest.mark.parametrize("case", range(9))
def test_golden_tokens_and_labels(golden, golden_tokenizer, case):
    z, config, messages, counts = conversation(golden, case)
    found = chat.encode(messages, counts, golden_tokenizer, **TOKENS, seed=None)
    np.testing.assert_array_equal(found.tokens, z[f"out/ids_{case:02d}"])
    np.testing.assert_array_equal(found.labels, z[f"out/labels_{case:02d}"])
    np.testing.assert_array_equal(found.visual, found.tokens == golden_tokenizer.id("<image>"))
    prompt = chat.encode(
        messages[:-1], counts, golden_tokenizer, **TOKENS, seed=None, generation=True
    )
    np.testing.assert_array_equal(prompt.tokens, found.tokens[: len(prompt.tokens)])
    assert (prompt.labels == chat.IGNORE).all()


@pytest.mark.parametrize("case", [7, 8])
def test_golden_balanced_decisions(golden, golden_tokenizer, case):
    z, _, messages, counts = conversation(golden, case)
    every = z[f"out/labels_{case:02d}"]
    expected = Counter(z[f"out/labels_balanced_{case:02d}"].tolist())
    kept = set()
    for seed in map(str, range(8)):
        found = chat.encode(messages, counts, golden_tokenizer, **TOKENS, seed=seed).labels
        assert Counter(found.tolist()) == expected
        assert ((found == every) | (found == chat.IGNORE)).all()
        again = chat.encode(messages, counts, golden_tokenizer, **TOKENS, seed=seed).labels
        np.testing.assert_array_equal(found, again)
        kept.add(found.tobytes())
    assert (len(kept) > 1) == (case == 7)  # one surplus decision of four, or none


def bare(messages):
    """Returns messages without paths and absolute times, frame times under one key."""
    out = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {k: p[k] for k in ("type", "text") if k in p}
                | ({"time": p.get("time", p.get("timestamps"))} if p["type"] == "image" else {})
                for p in content
            ]
        out.append({"role": message["role"], "content": content})
    return out


def with_timestamps(messages):
    """Returns bare messages as `chat.encode` takes them, and how many frames they show."""
    shown = bare(messages)
    parts = [p for m in shown if not isinstance(m["content"], str) for p in m["content"]]
    for part in parts:
        part |= {"timestamps": [0.0, 1.0, 2.0]} if part["type"] == "video" else {}
    return shown, sum({"image": 1, "video": 3}.get(part["type"], 0) for part in parts)


def streamed(record, times):
    messages = annotation.stream_messages(record)
    return interleaved(messages[1:], times, times, record.get("start_time") or 0.0)


@pytest.mark.parametrize("case", range(6))
def test_golden_annotations(golden, case):
    z, _ = golden("videollama3_text")
    record = json.loads(str(z[f"in/annotation_{case:02d}"]))
    expected = json.loads(str(z[f"out/messages_{case:02d}"]))
    if record.get("stream"):
        times = z[f"in/annotation_timestamps_{case:02d}"].tolist()
        messages, dropped = streamed(record, times)
        frames = [p["image"] for m in messages if m["role"] == "stream" for p in m["content"]]
        used = json.loads(str(z[f"out/messages_info_{case:02d}"]))["frames_used"]
        assert frames == times[:used] and dropped == 0
    else:
        messages, repairs = annotation.ordinary_messages(record)
        leading, missing = {"leading_assistant": 1}, {"missing_tag": 1}
        assert repairs == (leading | missing if case == 2 else {})
    assert bare(messages) == bare(expected)


@pytest.mark.parametrize("case", range(6))
def test_golden_annotations_are_trained_as_their_messages(golden, golden_tokenizer, case):
    z, _ = golden("videollama3_text")
    record = json.loads(str(z[f"in/annotation_{case:02d}"]))
    times = z[f"in/annotation_timestamps_{case:02d}"].tolist()
    if record.get("stream"):
        messages, _ = streamed(record, times)
    else:
        messages, _ = annotation.ordinary_messages(record)
    found, expected = (
        chat.encode(shown, [2] * frames, golden_tokenizer, **TOKENS, seed=None)
        for shown, frames in map(
            with_timestamps, (messages, json.loads(str(z[f"out/messages_{case:02d}"])))
        )
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.labels, expected.labels)
    chat.check_answer(messages)
