"""Finds the images, videos and streams in a conversation and judges them without decoding.

A record's media are images, videos, and at most one stream: all images in stream messages are the
frames of one video, whatever is said in between. They may also be given as the video itself, see
`data.timed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vlmjax.data import chat, image, video
from vlmjax.data.health import BadRecord
from vlmjax.data.timed import interleaved, is_stream

MAX_PIXELS = 16 * image.MAX_PIXELS  # of all image files of a record: a minute of decoding
STREAM = "stream"  # name of a medium


@dataclass
class Medium:
    """An image, a video or a stream; all frames have one size."""

    name: str
    is_video: bool
    height: int
    width: int
    sources: Sequence  # one per frame: an image source or a VideoFrame

    def frames(self) -> Iterator[np.ndarray]:
        """Yields the decoded frames u8[h, w, 3] one by one."""
        reader, current, at = None, None, -1
        for source in self.sources:
            if not isinstance(source, video.VideoFrame):
                pixels = np.asarray(image.load_image(source))
                self._check(pixels)
                yield pixels
                continue
            if source.video is not current or source.index < at:
                reader, current, at = video.read_frames(source.video), source.video, -1
                pixels = None
            while at < source.index:
                pixels, at = next(reader), at + 1
            yield pixels

    def _check(self, pixels):
        height, width, _ = pixels.shape
        if (height, width) != (self.height, self.width):
            raise BadRecord(
                "damaged_media",
                f"{self.name} is {width}x{height} when decoded, its header says "
                f"{self.width}x{self.height}: write it anew or drop the record",
            )


class Media(NamedTuple):
    """What messages show.

    Attributes:
      messages: with timestamps filled in, and the frames of a stream between them.
      media: of the messages, in order.
      slots: (medium, frame) of each place where one is shown, in order.
      ends: number of slots up to the end of each message.
      dropped: number of messages left out because their stream was cut.
    """

    messages: list[dict]
    media: list[Medium]
    slots: list[tuple[int, int]]
    ends: list[int]
    dropped: int = 0

    def first(self, count: int) -> Media:
        """Returns what its first messages show."""
        slots = self.slots[: self.ends[count - 1]]
        shown = Counter(medium for medium, _ in slots)  # numbered as they come
        media = [replace(m, sources=m.sources[: shown[k]]) for k, m in enumerate(self.media)]
        return Media(self.messages[:count], media[: len(shown)], slots, self.ends[:count])


def gather(
    messages: Sequence[dict],
    *,
    max_frames: int,
    max_stream_frames: int,
    overlong: str = "error",
    **choice,
) -> Media:
    """Returns the media of checked messages.

    Args:
      messages: checked.
      max_frames: of a video.
      max_stream_frames: where `overlong` is "cut_at_turns", the messages of a stream file at or
        after the time of the first frame too many are left out.
      overlong: see `processor.ProcessorConfig`.
      choice: for `video.open_video`.
    """
    messages, dropped = _played(messages, overlong, max_stream_frames, **choice)
    found, media, slots, ends, stream = [], [], [], [], None
    for message in messages:
        content = message["content"]
        parts = []
        for part in () if isinstance(content, str) else content:
            if part["type"] == "video":
                medium, timestamps = _video(part, max_frames=max_frames, **choice)
                part = {"type": "video", "timestamps": timestamps}
                slots += [(len(media), k) for k in range(len(timestamps))]
                media.append(medium)
            elif part["type"] == "image" and message["role"] == "stream":
                if stream is None:
                    stream = len(media)
                    media.append(_image(_source(part, "image"), is_video=True))
                else:
                    _add_frame(media[stream], _source(part, "image"))
                slots.append((stream, len(media[stream].sources) - 1))
            elif part["type"] == "image":
                slots.append((len(media), 0))
                media.append(_image(_source(part, "image"), is_video=False))
            parts.append(part)
        found.append({**message, "content": content if isinstance(content, str) else parts})
        ends.append(len(slots))
    _check_sum(media)
    return Media(found, media, slots, ends, dropped)


def _played(messages, overlong, max_frames, **choice):
    """Returns messages with the frames of their stream, and how many of them a cut left out."""
    if not is_stream(messages):
        return messages, 0
    (part,), said = messages[0]["content"], messages[1:]
    source, start = _source(part, "video"), part.get("start_time")
    every = dict(max_frames=1_000_000, start=start, end=part.get("end_time"))
    clip = video.open_video(source, **every, **choice)
    frames = [video.VideoFrame(clip, k) for k in range(len(clip.pts))]
    most = max_frames if overlong == "cut_at_turns" else len(frames)
    played, dropped = interleaved(said, clip.timestamps, frames, start or 0.0, most)
    if dropped:
        chat.check_answer(played)
    return played, dropped


def check_stream_frames(media: list[Medium], most: int) -> None:
    """Raises BadRecord for a stream of more frames."""
    for number in (len(m.sources) for m in media if m.name == STREAM):
        if number > most:
            raise BadRecord(
                "too_long",
                f"the stream has {number} frames, max_stream_frames is {most}: shorten the "
                "stream, raise it, or set overlong='cut_at_turns'",
            )


def _check_sum(media: list[Medium]) -> None:
    """Raises BadRecord if all image files together have more pixels than are decoded."""
    pixels = 0
    for m in media:
        decoded = (np.ndarray, video.VideoFrame)
        pixels += m.height * m.width * sum(not isinstance(s, decoded) for s in m.sources)
    if pixels > MAX_PIXELS:
        raise BadRecord(
            "hostile_media",
            f"the images of the record have {pixels} pixels together, at most {MAX_PIXELS} are "
            "decoded: shrink them or split the record",
        )


def _source(part: dict, key: str):
    if part.get(key) is None:
        raise BadRecord(
            "malformed",
            f"a part of type {part['type']!r} has no {key!r}: give the file, array or PIL image",
        )
    return part[key]


def _size(source) -> tuple[int, int]:
    if isinstance(source, video.VideoFrame):
        return source.video.height, source.video.width
    return image.image_size(source)


def _image(source, is_video: bool) -> Medium:
    return Medium(STREAM if is_video else "image", is_video, *_size(source), [source])


def _add_frame(stream: Medium, source) -> None:
    height, width = _size(source)
    if (height, width) != (stream.height, stream.width):
        raise BadRecord(
            "malformed",
            f"stream frame {len(stream.sources)} is {width}x{height}, the first is "
            f"{stream.width}x{stream.height}: "
            "all frames of a stream must have one size",
        )
    stream.sources.append(source)


def _video(part: dict, max_frames: int, **choice) -> tuple[Medium, list[float]]:
    source = _source(part, "video")
    if isinstance(source, np.ndarray):
        return _frame_array(part, source, max_frames)
    clip = video.open_video(
        source,
        max_frames=max_frames,
        start=part.get("start_time"),
        end=part.get("end_time"),
        **choice,
    )
    frames = [video.VideoFrame(clip, k) for k in range(len(clip.pts))]
    return Medium(video.name(clip.source), True, clip.height, clip.width, frames), list(
        clip.timestamps
    )


def _frame_array(part: dict, frames: np.ndarray, max_frames: int) -> tuple[Medium, list[float]]:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise BadRecord(
            "malformed",
            f"video array is {frames.dtype}{list(frames.shape)}: give uint8[t, h, w, 3], t >= 1",
        )
    timestamps = [float(t) for t in part.get("timestamps") or ()]
    if len(timestamps) != len(frames):
        raise BadRecord(
            "malformed",
            f"video array has {len(frames)} frames and {len(timestamps)} timestamps: give one "
            "time in seconds per frame",
        )
    if len(frames) > max_frames:
        raise BadRecord(
            "too_long",
            f"video array has {len(frames)} frames, max_frames is {max_frames}: choose frames or "
            "raise it",
        )
    height, width = frames.shape[1:3]
    image.check_size(height, width, "video array")
    return Medium("video array", True, height, width, list(frames)), timestamps
