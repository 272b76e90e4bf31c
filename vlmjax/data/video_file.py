"""Opens untrusted video files: only local files of listed containers, or their bytes.

Sizes are judged by headers, and all that reads of one video has one `Clock`.
"""

from __future__ import annotations

import errno
import io
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import av

from vlmjax.data.health import BadRecord
from vlmjax.data.image import check_size, open_file

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf,nut"


class Limits(NamedTuple):
    """What a video may cost: pixels a frame, seconds, frames, frames a second, and seconds of
    computing for all that is read of it."""

    pixels: int = 36_000_000
    duration: float = 6 * 3600.0
    frames: int = 6 * 3600 * 60
    rate: float = 1000.0
    deadline: float = 120.0


DEFAULT_LIMITS = Limits()
# EIO and ENOMEM are not among them: FFmpeg also says so of damaged files.
_MACHINE_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT}


class Clock:
    """What is left of the computing that a video may cost; whatever reads of it shares this.

    Seconds of the thread count, not of the day: neither a busy machine nor a slow file system makes
    a video a bad one.
    """

    def __init__(self, source: Path | bytes, limits: Limits):
        self.source, self.limits, self.left = source, limits, limits.deadline

    def start(self) -> None:
        """Counts from now on."""
        self._since = time.thread_time()

    def check(self) -> None:
        """Raises BadRecord if nothing is left."""
        now = time.thread_time()
        self.left, self._since = self.left - (now - self._since), now
        if self.left < 0:
            raise too_slow(self)


@contextmanager
def opened(clock: Clock):
    """Gives (container, stream) and turns decoder errors into BadRecords that name the file."""
    source, limits = clock.source, clock.limits
    clock.start()
    encoded = isinstance(source, bytes)
    options = {
        "protocol_whitelist": "none" if encoded else "file",  # "none" is the name of no protocol
        "format_whitelist": CONTAINERS,
        "max_pixels": str(limits.pixels),
    }
    file = io.BytesIO(source) if encoded else f"file:{source.resolve()}"
    # Tags may be in any encoding, and nobody reads them: from 19 on PyAV decodes none unless asked.
    asks = int(av.__version__.partition(".")[0]) >= 19
    tags = {} if asks else {"metadata_errors": "replace"}
    try:
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
        raise too_slow(clock) from error
    except av.error.FFmpegError as error:
        if error.errno in _MACHINE_ERRNOS:
            raise
        raise BadRecord(
            "damaged_media",
            f"{name(source)} cannot be read ({error.strerror}); its content is "
            f"{_sniff(source)}, a video in one of {CONTAINERS} is needed: fetch it again or "
            "convert it",
        ) from error


def name(source: Path | bytes) -> str:
    """Returns what messages call a video."""
    if isinstance(source, bytes):
        return f"video of {len(source)} bytes"
    return f"video {str(source)!r}"


def too_slow(clock: Clock) -> BadRecord:
    return BadRecord(
        "hostile_media",
        f"{name(clock.source)} took longer than {clock.limits.deadline:g} s to read: shorten it, "
        "re-encode it with more key frames or raise video_deadline of the processor config",
    )


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
