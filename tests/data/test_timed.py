"""Streams: how they are written, what is refused, and where they are cut."""

import numpy as np
import pytest

from vlmjax.data import chat
from vlmjax.data.annotation import stream_messages
from vlmjax.data.health import BadRecord
from vlmjax.data.timed import interleaved

VIDEO = {"type": "video", "video": "v.mp4"}


def spoken(*times):
    return [{"role": "assistant", "content": "x", "time": t} for t in times]


def test_streams_are_cut_where_messages_would_lack_frames():
    times = [0.0, 1.0, 2.0, 3.0]
    messages, dropped = interleaved(spoken(0.5, 1.0, 2.0, 9.0), times, times, max_frames=2)
    assert [m["role"] for m in messages] == ["stream", "assistant", "stream", "assistant"]
    assert dropped == 2
    frames = list(np.arange(1000.0))
    messages, dropped = interleaved(spoken(399, 399.5, 400), frames, frames)
    assert [m["role"] for m in messages].count("stream") == 400 and dropped == 1


@pytest.mark.parametrize(
    "said,match",
    [
        (spoken(2.0, 1.0), "message 2 of a stream has time 1.0 after 2.0: give seconds and sort"),
        (spoken(float("nan")), "message 1 of a stream has time nan"),
        (spoken(None), "message 1 of a stream has time None"),
        ([], "no 'conversation'"),
        (None, "'conversation' of type NoneType"),
        ([{"role": "assistant", "content": 3, "time": 0}], "says a int"),
        ([{"role": "assistant", "content": [], "time": 0}], "says a list: give text"),
    ],
)
def test_malformed_streams_are_refused(said, match):
    with pytest.raises(BadRecord, match=match) as error:
        stream_messages({"video": "v.mp4", "conversation": said})
    assert error.value.reason == "malformed"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "stream", "content": [VIDEO]}],
        [{"role": "stream", "content": [VIDEO, VIDEO]}, *spoken(0.0)],
        [{"role": "stream", "content": [VIDEO]}, {"role": "user", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "stream", "content": [VIDEO]}],
    ],
)
def test_a_stream_comes_first_and_what_is_said_has_a_time(messages):
    with pytest.raises(BadRecord) as error:
        chat.check_messages(messages)
    assert error.value.reason == "malformed"
