"""Chooses frames of untrusted video files by presentation time, then decodes only those, one at a
time.

`open_video` reads packet headers and one frame; `read_frames` decodes. Number of frames, duration
and the seconds that reading takes are limited, and runs of packets between key frames that hold no
chosen frame are skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from vlmjax.data.health import BadRecord
from vlmjax.data.image import check_bytes, check_path
from vlmjax.data.sampling import SAMPLERS
from vlmjax.data.video_file import DEFAULT_LIMITS, Clock, Limits, name, opened

TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # whose headers say how long they last


@dataclass(frozen=True)
class Video:
    """The chosen frames of a file.

    Attributes:
      source: the file, or its bytes.
      height, width: of the upright frame in pixels.
      pts: presentation time of each chosen frame in stream units, ascending, may repeat.
      timestamps: the time in seconds each frame is shown to the model with.
      runs: indices of the key-frame runs to decode, or None for all.
      clock: of its source.
    """

    source: Path | bytes = field(repr=False)
    height: int
    width: int
    pts: tuple[int, ...]
    timestamps: tuple[float, ...]
    runs: frozenset[int] | None
    clock: Clock = field(repr=False, compare=False)


class VideoFrame(NamedTuple):
    """One chosen frame of a video, by position in `video.pts`."""

    video: Video
    index: int


class _Timeline(NamedTuple):
    pts: list[int]  # ascending
    runs: dict[int, int] | None  # of packets, to which each pts belongs
    starts: list[int]  # pts of the key frame of each run
    end: int  # where the last frame ends
    size: tuple[int, int]  # (height, width) of the first frame, upright

    def needed(self, pts: int) -> tuple[int, ...]:
        """Returns the runs to decode for a frame."""
        run = self.runs[pts]
        # A picture shown before its run's key frame may also refer to the run before.
        return (run,) if pts >= self.starts[run] else (run - 1, run)


def open_video(
    source: str | Path | bytes,
    *,
    fps: float = 1.0,
    max_frames: int = 180,
    sampling: str = "last_of_second",
    start: float | None = None,
    end: float | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Video:
    """Returns the frames to show of a video file, without decoding them.

    Args:
      source: a local file or its bytes; the content decides what it is, not the extension.
      fps: frames a second to choose.
      max_frames: more are thinned out evenly.
      sampling: "last_of_second" (what ffmpeg's fps=1:round=down chooses) or "transformers".
      start, end: seconds to cut out of the file, timestamps stay absolute.
      limits: what the file may cost.
    """
    if sampling not in SAMPLERS:
        raise ValueError(f"frame sampling {sampling!r} is unknown: use one of {sorted(SAMPLERS)}")
    if isinstance(source, bytes):
        check_bytes(source, "video")
    elif isinstance(source, (str, Path)):
        source = check_path(source, "video")
    else:
        raise BadRecord(
            "malformed",
            f"video source is a {type(source).__name__}; give a path, bytes or an array "
            "uint8[t, h, w, 3]",
        )
    clock = Clock(source, limits)
    with opened(clock) as (container, stream):
        timeline = _timeline(container, stream, clock)
        base = stream.time_base
        rate = stream.average_rate or stream.guessed_rate
        offset = (
            Fraction(container.start_time, av.time_base)
            if container.start_time is not None
            else None
        )
    times = [pts * base for pts in timeline.pts]
    seconds = timeline.end * base - times[0]
    if seconds > limits.duration or len(times) > limits.rate * max(seconds, 1):
        raise _too_much(clock, len(times), seconds)
    try:
        chosen, stamps = SAMPLERS[sampling](
            times,
            timeline.end * base,
            fps=fps,
            max_frames=max_frames,
            rate=rate,
            offset=offset,
            start=start,
            end=end,
        )
    except ValueError as error:
        cut = start is not None or end is not None
        raise BadRecord(
            "malformed" if cut else "damaged_media", f"{name(source)}: {error}"
        ) from error
    pts = tuple(timeline.pts[k] for k in chosen)
    decoded = timeline.runs is not None
    runs = frozenset(run for p in pts for run in timeline.needed(p)) if decoded else None
    return Video(source, *timeline.size, pts, tuple(stamps), runs, clock)


def read_frames(video: Video) -> Iterator[np.ndarray]:
    """Yields u8[h, w, 3] for each chosen frame in order; holds one frame at a time."""
    left = Counter(video.pts)
    with opened(video.clock) as (container, stream):
        for frame in _decode(container, stream, video.clock, video.runs, frozenset(left)):
            repeats = left.pop(frame.pts, 0)
            if not repeats:
                continue
            if frame.is_corrupt:
                raise BadRecord(
                    "damaged_media",
                    f"{name(video.source)} has a damaged frame at {float(frame.time or 0):.1f} s, "
                    "whole ones are needed: fetch it again or drop the record",
                )
            pixels = _upright(frame)
            if pixels.shape != (video.height, video.width, 3):
                raise BadRecord(
                    "damaged_media",
                    f"{name(video.source)} changes size from {video.width}x{video.height} to "
                    f"{pixels.shape[1]}x{pixels.shape[0]}, one size is allowed: re-encode it",
                )
            for _ in range(repeats):
                yield pixels
            if not left:
                return
            video.clock.start()  # what the frame was used for is not counted
    raise BadRecord(
        "damaged_media",
        f"{name(video.source)} did not give {sum(left.values())} of its {len(video.pts)} chosen "
        "frames, all are needed: it is damaged, fetch it again or drop the record",
    )


def load_video(
    source: str | Path | bytes, limits: Limits = DEFAULT_LIMITS, **choice
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (u8[t, h, w, 3] frames, f64[t] timestamps); `choice` as in `open_video`."""
    video = open_video(source, limits=limits, **choice)
    return np.stack(list(read_frames(video))), np.array(video.timestamps)


def _timeline(container, stream, clock: Clock) -> _Timeline:
    """Returns when each frame is shown, from packets, or by decoding where they do not say.

    Of the pictures only the first is decoded.
    """
    runs, starts, size, ends = {}, [], None, {}
    last, longest = None, 0  # pts of the last frame, and how long it is shown
    most = clock.limits.duration / stream.time_base
    for packet in container.demux():
        clock.check()
        if packet.size == 0:
            continue
        number, pts, length = packet.stream_index, packet.pts, packet.duration or 0
        time = packet.dts if pts is None else pts
        ends[number] = max(ends.get(number, 0), (time or 0) + length)
        if number != stream.index:
            continue
        if pts is None:
            return _decoded_timeline(stream, clock)
        if packet.is_keyframe:
            starts.append(pts)
        if starts and size is None:
            size = next(map(_size, packet.decode()), None)
        if starts and not packet.is_discard and pts >= starts[0]:
            runs[pts] = len(starts) - 1
            if last is None or pts >= last:
                last, longest = pts, length
            if len(runs) > clock.limits.frames or last - starts[0] > most:
                raise _too_much(clock, len(runs), (last - starts[0]) * stream.time_base)
    if size is None and starts:
        size = next(map(_size, stream.codec_context.decode(None)), None)
    if not runs or size is None:
        raise _empty(clock.source)
    _check_whole(container, ends, stream, runs, clock)
    pts = sorted(runs)
    return _Timeline(pts, runs, starts, last + (longest or _step(pts, stream)), size)


def _check_whole(container, ends: dict[int, int], stream, runs, clock: Clock) -> None:
    """Raises BadRecord if the file says that it goes on after its last packet, of sound or picture.

    By more than a second, a twentieth, or two of the longest frames: headers are not exact. Some
    formats count from the first frame, that is later.
    """
    if container.format.name not in TIMED or container.duration is None:
        return
    end = float(max(end * container.streams[number].time_base for number, end in ends.items()))
    gap = np.diff(sorted(runs)).max(initial=0) * float(stream.time_base)
    until = container.duration / av.time_base
    if until - end > max(1, until / 20, 2 * gap):
        raise BadRecord(
            "damaged_media",
            f"{name(clock.source)} says that it lasts until {until:.1f} s and ends at {end:.1f} s, "
            "all of it is needed: it is cut off; fetch it again",
        )


def _decoded_timeline(stream, clock: Clock) -> _Timeline:
    shown, size = {}, None
    most = clock.limits.duration / stream.time_base
    with opened(clock) as (container, fresh):
        for frame in _decode(container, fresh, clock):
            size = size or _size(frame)
            if frame.pts is None:
                continue
            shown[frame.pts] = frame.duration or 0
            length = frame.pts - next(iter(shown))
            if len(shown) > clock.limits.frames or length > most:
                raise _too_much(clock, len(shown), length * stream.time_base)
    if not shown:
        raise _empty(clock.source)
    pts = sorted(shown)
    return _Timeline(pts, None, [], pts[-1] + (shown[pts[-1]] or _step(pts, stream)), size)


def _too_much(clock: Clock, frames: int, seconds: Fraction) -> BadRecord:
    limits = clock.limits
    return BadRecord(
        "hostile_media",
        f"{name(clock.source)} has {frames} frames in {float(seconds):.1f} s, at most "
        f"{limits.duration:.0f} s, {limits.frames} frames and {limits.rate:.0f} frames/s are "
        "read: cut it or re-encode it",
    )


def _step(pts: list[int], stream) -> int:
    """Returns the usual distance of two frames in stream units."""
    if len(pts) > 1:
        return int(np.median(np.diff(pts)))
    rate = stream.average_rate or stream.guessed_rate
    return int(1 / (rate * stream.time_base)) if rate else 0


def _empty(source: Path | bytes) -> BadRecord:
    return BadRecord(
        "damaged_media",
        f"{name(source)} has no frames, at least one is needed: drop it or fetch it again",
    )


def _decode(container, stream, clock, runs=None, wanted=None):
    """Yields the decoded frames of the key-frame runs asked for, in order of presentation.

    Of H.264, pictures that no other refers to and that are not in `wanted` are left out: about a
    quarter of the time. Not in interlaced video, where a picture may be two packets.
    """
    context, run, decoding, skipping = stream.codec_context, -1, False, False
    may_skip = runs is not None and wanted is not None and context.name == "h264"
    for packet in container.demux(stream):
        clock.check()
        if packet.size == 0:
            continue
        run += packet.is_keyframe
        if run < 0:
            continue
        if runs is None or run in runs:
            decoding = True
            if skipping:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for frame in packet.decode():
                clock.check()
                skipping = may_skip and not frame.interlaced_frame
                if may_skip and not skipping:
                    context.skip_frame = "DEFAULT"
                yield frame
        elif decoding:
            yield from context.decode(None)
            context.flush_buffers()
            decoding = False
    if decoding:
        yield from context.decode(None)


def _turns(frame) -> int:
    """Returns the quarter turns that phones store beside the pixels."""
    return round(frame.rotation / 90) % 4


def _size(frame) -> tuple[int, int]:
    """Returns the (height, width) of a decoded frame, upright."""
    return (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)


def _upright(frame) -> np.ndarray:
    """Returns u8[h, w, 3] of a decoded frame, upright."""
    pixels, turns = frame.to_ndarray(format="rgb24"), _turns(frame)
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
