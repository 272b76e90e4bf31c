"""Chooses frames of untrusted video files by presentation time, then decodes only those, one at a
time.

`open_video` reads packet headers and one frame; `read_frames` decodes. Only local files of listed
containers, or their bytes, are opened, frame size and duration are limited, decoding has a
deadline, and runs of packets between key frames that hold no chosen frame are skipped.
"""

from __future__ import annotations

import errno
import io
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from vlmjax.data.health import BadRecord
from vlmjax.data.image import check_bytes, check_path, check_size, open_file
from vlmjax.data.sampling import SAMPLERS

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf,nut"


class Limits(NamedTuple):
    """What a video may cost: pixels a frame, seconds, frames a second, seconds of decoding."""

    pixels: int = 36_000_000
    duration: float = 6 * 3600.0
    rate: float = 1000.0
    deadline: float = 120.0


DEFAULT_LIMITS = Limits()
# EIO and ENOMEM are not among them: FFmpeg also says so of damaged files.
_MACHINE_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT}


@dataclass(frozen=True)
class Video:
    """The chosen frames of a file.

    Attributes:
      source: the file, or its bytes.
      height, width: of the upright frame in pixels.
      pts: presentation time of each chosen frame in stream units, ascending, may repeat.
      timestamps: the time in seconds each frame is shown to the model with.
      runs: indices of the key-frame runs to decode, or None for all.
    """

    source: Path | bytes = field(repr=False)
    height: int
    width: int
    pts: tuple[int, ...]
    timestamps: tuple[float, ...]
    runs: frozenset[int] | None


class VideoFrame(NamedTuple):
    """One chosen frame of a video, by position in `video.pts`."""

    video: Video
    index: int


class _Timeline(NamedTuple):
    pts: list[int]  # ascending
    runs: dict[int, tuple[int, ...]] | None  # runs of packets needed to decode each pts
    end: int  # where the last frame ends


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
    with _opened(source, limits) as (container, stream):
        timeline = _timeline(container, stream, source, limits)
        base = stream.time_base
        rate = stream.average_rate or stream.guessed_rate
        offset = (
            Fraction(container.start_time, av.time_base)
            if container.start_time is not None
            else None
        )
    times = [pts * base for pts in timeline.pts]
    duration = float(timeline.end * base - times[0])
    if duration > limits.duration or len(times) > limits.rate * max(duration, 1):
        raise BadRecord(
            "hostile_media",
            f"{name(source)} has {len(times)} frames in {duration:.1f} s, at most "
            f"{limits.duration:.0f} s and {limits.rate:.0f} frames/s are read: cut it or "
            "re-encode it",
        )
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
    runs = None if timeline.runs is None else frozenset(r for p in pts for r in timeline.runs[p])
    height, width = _frame_size(source, limits)
    return Video(source, height, width, pts, tuple(stamps), runs)


def read_frames(video: Video, limits: Limits = DEFAULT_LIMITS) -> Iterator[np.ndarray]:
    """Yields u8[h, w, 3] for each chosen frame in order; holds one frame at a time."""
    left = Counter(video.pts)
    with _opened(video.source, limits) as (container, stream):
        for frame in _decode(container, stream, video.source, limits, video.runs, frozenset(left)):
            repeats = left.pop(frame.pts, 0)
            if not repeats:
                continue
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
    return np.stack(list(read_frames(video, limits))), np.array(video.timestamps)


@contextmanager
def _opened(source: Path | bytes, limits: Limits):
    """Gives (container, stream) and turns decoder errors into BadRecords that name the file."""
    encoded = isinstance(source, bytes)
    options = {
        "protocol_whitelist": "none" if encoded else "file",  # "none" is the name of no protocol
        "format_whitelist": CONTAINERS,
        "max_pixels": str(limits.pixels),
    }
    file = io.BytesIO(source) if encoded else f"file:{source.resolve()}"
    try:
        # Tags may be in any encoding, and nobody reads them.
        tags = dict(metadata_errors="replace")
        with av.open(file, options=options, timeout=limits.deadline, **tags) as container:
            if not container.streams.video:
                raise BadRecord(
                    "damaged_media",
                    f"{name(source)} has no video stream (is it sound only?): drop it",
                )
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None:
                raise BadRecord(
                    "damaged_media",
                    f"{name(source)} uses a codec this build cannot decode: re-encode it, "
                    "e.g. as H.264",
                )
            if not (context.width and context.height):
                raise BadRecord(  # FFmpeg hides a size above the limit
                    "hostile_media",
                    f"{name(source)} says no frame size, or one above {limits.pixels} pixels: "
                    "re-encode it",
                )
            check_size(context.height, context.width, name(source), limits.pixels)
            context.options = {"max_pixels": str(limits.pixels)}
            context.thread_count = 1  # loaders run many workers
            yield container, stream
    except av.error.ExitError as error:
        raise _too_slow(source, limits) from error
    except av.error.FFmpegError as error:
        if error.errno in _MACHINE_ERRNOS:
            raise
        raise BadRecord(
            "damaged_media",
            f"{name(source)} cannot be read ({error.strerror}); its content is "
            f"{_sniff(source)}, a video in one of {CONTAINERS} is needed: fetch it again or "
            "convert it",
        ) from error


def _timeline(container, stream, source: Path | bytes, limits: Limits) -> _Timeline:
    """Returns when each frame is shown, from packets, or by decoding where they do not say."""
    stop = time.monotonic() + limits.deadline
    entries, starts, longest = [], [], {}
    for packet in container.demux(stream):
        _check_deadline(stop, source, limits)
        if packet.size == 0:
            continue
        if packet.pts is None:
            return _decoded_timeline(stream, source, limits)
        if packet.is_keyframe:
            starts.append(packet.pts)
        if starts and not packet.is_discard and packet.pts >= starts[0]:
            entries.append((packet.pts, len(starts) - 1))
            longest[packet.pts] = packet.duration or 0
    if not entries:
        raise _empty(source)
    # A picture shown before its run's key frame may also refer to the run before.
    runs = {pts: (run,) if pts >= starts[run] else (run - 1, run) for pts, run in entries}
    pts = sorted(runs)
    return _Timeline(pts, runs, pts[-1] + (longest[pts[-1]] or _step(pts, stream)))


def _decoded_timeline(stream, source: Path | bytes, limits: Limits) -> _Timeline:
    with _opened(source, limits) as (container, fresh):
        shown = {
            f.pts: f.duration or 0
            for f in _decode(container, fresh, source, limits)
            if f.pts is not None
        }
    if not shown:
        raise _empty(source)
    pts = sorted(shown)
    return _Timeline(pts, None, pts[-1] + (shown[pts[-1]] or _step(pts, stream)))


def _step(pts: list[int], stream) -> int:
    """Returns the usual distance of two frames in stream units."""
    if len(pts) > 1:
        return int(np.median(np.diff(pts)))
    rate = stream.average_rate or stream.guessed_rate
    return int(1 / (rate * stream.time_base)) if rate else 0


def name(source: Path | bytes) -> str:
    """Returns what messages call a video."""
    if isinstance(source, bytes):
        return f"video of {len(source)} bytes"
    return f"video {str(source)!r}"


def _empty(source: Path | bytes) -> BadRecord:
    return BadRecord(
        "damaged_media",
        f"{name(source)} has no frames, at least one is needed: drop it or fetch it again",
    )


def _check_deadline(stop: float, source: Path | bytes, limits: Limits) -> None:
    if time.monotonic() > stop:
        raise _too_slow(source, limits)


def _too_slow(source: Path | bytes, limits: Limits) -> BadRecord:
    return BadRecord(
        "hostile_media",
        f"{name(source)} took longer than {limits.deadline:g} s to read: shorten it, "
        "re-encode it with more key frames or raise the deadline",
    )


def _decode(container, stream, source, limits, runs=None, wanted=None):
    """Yields the decoded frames of the key-frame runs asked for, in order of presentation.

    Of H.264, pictures that no other refers to and that are not in `wanted` are left out: about a
    quarter of the time. Not in interlaced video, where a picture may be two packets.
    """
    stop = time.monotonic() + limits.deadline
    context, run, decoding, skipping = stream.codec_context, -1, False, False
    may_skip = runs is not None and wanted is not None and context.name == "h264"
    for packet in container.demux(stream):
        _check_deadline(stop, source, limits)
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
                _check_deadline(stop, source, limits)
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


def _frame_size(source: Path | bytes, limits: Limits) -> tuple[int, int]:
    """Returns (height, width) of the first frame, upright."""
    with _opened(source, limits) as (container, stream):
        for frame in _decode(container, stream, source, limits):
            return (
                (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
            )
    raise _empty(source)


def _upright(frame) -> np.ndarray:
    """Returns u8[h, w, 3] turned by the rotation that phones store beside the pixels."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


_MAGIC = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"%PDF", "a PDF document"),
    (b"version https://git-lfs", "a git-lfs pointer (the real file was not downloaded)"),
    (b"RIFF", "a RIFF file (AVI, WAV or WebP)"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
)


def _sniff(source: Path | bytes) -> str:
    """Returns in words what the first bytes of a file look like."""
    if isinstance(source, bytes):
        head = source[:512]
    else:
        with open_file(source, "video") as file:
            head = file.read(512)
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[4:8] == b"ftyp":
        return "an MP4 file, damaged or truncated"
    printable = sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    return (
        "text, e.g. a web page or a playlist" if printable == len(head) else "unknown binary data"
    )
