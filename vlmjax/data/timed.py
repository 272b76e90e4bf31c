"""Times of messages, and streams: a video whose frames come between what is said.

[{"role": "stream", "content": [{"type": "video", "video": path, "start_time": 2.0}]},
 {"role": "user", "content": "Tell me.", "time": 2.0},
 {"role": "assistant", "content": "Now.", "time": 4.5}]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmjax.data.health import BadRecord

TIMES = ("time", "start_time", "end_time")  # of a part, in seconds


def is_time(value) -> bool:
    """Whether a value is a time in seconds, or None."""
    number = isinstance(value, (int, float, np.integer, np.floating))
    return value is None or (number and bool(abs(value) < 1e15))  # also false for inf and nan


def is_stream(messages: Sequence[dict]) -> bool:
    """Whether messages begin with the video of a stream, whose frames come in between."""
    content = messages[0]["content"]
    opens = messages[0]["role"] == "stream" and not isinstance(content, str)
    return opens and any(part["type"] == "video" for part in content)


def check_stream(messages: Sequence[dict]) -> None:
    """Raises BadRecord if messages are of a stream and do not say, in order, when they are said."""
    if not is_stream(messages):
        return
    if len(messages[0]["content"]) > 1:
        raise BadRecord("malformed", "message 0 (stream) holds a video and more: move the rest")
    if len(messages) < 2:
        raise BadRecord("malformed", "nothing is said in a stream: give messages with their time")
    before = float("-inf")
    for number, message in enumerate(messages[1:], 1):
        time = message.get("time")
        if time is None or not is_time(time) or time < before:
            raise BadRecord(
                "malformed",
                f"message {number} of a stream has time {str(time)[:80]} after {before}: give "
                "seconds and sort messages by them",
            )
        before = time


def interleaved(
    messages: Sequence[dict],
    timestamps: Sequence[float],
    frames: Sequence,
    origin: float = 0.0,
    max_frames: int = 400,
) -> tuple[list[dict], int]:
    """Returns the messages of a stream with its frames in between, and how many were dropped
    because the stream was cut.

    Before each message come the frames shown up to its time, one stream message each. Frames after
    the last message are left out.

    Args:
      messages: in order of their "time".
      timestamps: seconds of each frame, absolute in the file.
      frames: image sources, one per timestamp.
      origin: the second from which shown times count.
      max_frames: messages at or after the time of the first frame beyond it are dropped.
    """
    cut = timestamps[max_frames] if len(timestamps) > max_frames else float("inf")
    played, shown = [], 0
    for number, message in enumerate(messages):
        if message["time"] >= cut:
            return played, len(messages) - number
        while shown < len(timestamps) and timestamps[shown] <= message["time"]:
            part = {"type": "image", "image": frames[shown], "time": timestamps[shown] - origin}
            played.append({"role": "stream", "content": [part]})
            shown += 1
        played.append({"role": message["role"], "content": message["content"]})
    return played, 0
