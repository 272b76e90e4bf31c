"""Opens images from untrusted files: the header is judged before a pixel is decoded.

The result is always 8-bit RGB by Pillow's plain `convert("RGB")`, as VideoLLaMA3 does it: palettes
are looked up, alpha is dropped (not composited), greyscale is repeated, CMYK is inverted naively,
the EXIF orientation is not applied, and an animation gives its first frame. One deviation: 16-bit
greyscale keeps its high byte, where `convert` would clip everything above 255 to white.
"""

from __future__ import annotations

import errno
import io
import re
import stat
import struct
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin

from vlmjax.data.health import BadRecord

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 89_000_000  # below Pillow's own warning limit of 89.5 million
MAX_ASPECT = 200
MAX_SCANS = 100  # of a JPEG over its pixels; encoders write up to a dozen

# Pillow only warns between one and two times its limit; nobody reads a loader's warnings.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

_DECODE_ERRORS = (OSError, SyntaxError, EOFError, ValueError, struct.error, zlib.error)

# What a name or a file is to blame for. Other errors are of the machine, such as EMFILE or EIO.
_FILE_ERRORS = ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "EACCES", "EPERM", "EINVAL")
_FILE_ERRNOS = {getattr(errno, name) for name in _FILE_ERRORS}


def check_machine(error: Exception) -> None:
    """Raises an error of the machine again, for which no record must be called bad."""
    number = getattr(error, "errno", None)  # decoders raise OSErrors without
    if isinstance(error, OSError) and number is not None and number not in _FILE_ERRNOS:
        raise error


def check_size(height: int, width: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raises BadRecord if an image or frame of this size must not be decoded."""
    if height < 1 or width < 1:
        raise BadRecord(
            "damaged_media",
            f"{name} is {width}x{height}, both sides must be at least 1: drop it or repair it",
        )
    if height * width > max_pixels:
        raise BadRecord(
            "hostile_media",
            f"{name} is {width}x{height} = {height * width} pixels, at most {max_pixels} are "
            "decoded: shrink the file",
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadRecord(
            "hostile_media",
            f"{name} is {width}x{height}, the aspect ratio may be at most {MAX_ASPECT}: crop or "
            "tile it",
        )


_JPEG_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_SCAN, _END = b"\xda", b"\xd9"


def check_scans(data: bytes, name: str) -> None:
    """Raises BadRecord for a JPEG that wants its pixels, however few bytes, gone over for long."""
    if data.count(b"\xff" + _SCAN) <= MAX_SCANS:  # as all but a few; quicker than the walk below
        return
    at, scans = 2, 0
    while (marker := _JPEG_MARKER.search(data, at)) and marker[1] != _END:
        scans += marker[1] == _SCAN
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    if scans > MAX_SCANS:
        raise BadRecord(
            "hostile_media",
            f"{name} has {scans} scans, at most {MAX_SCANS} are decoded: write it anew",
        )


def check_path(path: str | Path, kind: str) -> Path:
    """Returns the path of a local file; URLs, missing and empty files are BadRecords."""
    if "://" in str(path):
        raise BadRecord(
            "remote_media",
            f"{kind} {str(path)!r} is a URL, only local files are opened: download it first",
        )
    path = Path(path)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        check_machine(error)
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise BadRecord(
            "missing_file",
            f"{kind} {str(path)!r} is not a file: check the path and the data root",
        )
    if not status.st_size:
        raise BadRecord("missing_file", f"{kind} {str(path)!r} is empty: fetch it again")
    return path


def open_file(path: Path, kind: str):
    """Opens a file for reading; one that may not be read is a BadRecord."""
    try:
        return open(path, "rb")
    except OSError as error:
        check_machine(error)
        raise BadRecord(
            "missing_file",
            f"{kind} {str(path)!r} cannot be opened ({error.strerror}): check its permissions",
        ) from error


def check_bytes(data: bytes, kind: str) -> bytes:
    """Returns the bytes of an encoded file; none at all are a BadRecord."""
    if not data:
        raise BadRecord("missing_file", f"{kind} of 0 bytes is empty: fetch it again")
    return data


def image_size(source) -> tuple[int, int]:
    """Returns the checked (height, width) of an image source from its header alone."""
    if isinstance(source, np.ndarray):
        _check_array(source)
        height, width = source.shape[:2]
        return height, width
    with _opened(source) as (image, name):
        check_size(image.height, image.width, name)
        return image.height, image.width


def load_image(source) -> Image.Image:
    """Returns the decoded RGB image of a path, bytes of a file, PIL image or array u8[h, w, 3]."""
    if isinstance(source, np.ndarray):
        _check_array(source)
        return Image.fromarray(source)
    with _opened(source) as (image, name):
        check_size(image.height, image.width, name)
        try:
            if image is not source and isinstance(image, JpegImagePlugin.JpegImageFile):
                image.fp.seek(0)
                check_scans(image.fp.read(), name)
            image.load()
        except BadRecord:
            raise
        except _DECODE_ERRORS as error:
            check_machine(error)
            raise BadRecord(
                "damaged_media",
                f"{name} cannot be decoded ({error}), whole files are needed: it is damaged or "
                "truncated; fetch it again or drop the record",
            ) from error
        return _to_rgb(image, name)


def _check_array(array: np.ndarray) -> None:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise BadRecord(
            "malformed",
            f"image array is {array.dtype}{list(array.shape)}, uint8[h, w, 3] is needed: convert "
            "it to 8-bit RGB",
        )
    check_size(*array.shape[:2], "image array")


@contextmanager
def _opened(source):
    """Gives (image with only its header read, its name for messages) and closes what it opened."""
    if isinstance(source, Image.Image):
        yield source, "PIL image"
        return
    if not isinstance(source, (bytes, str, Path)):
        raise BadRecord(
            "malformed",
            f"image source is a {type(source).__name__}; give a path, bytes, a PIL image or an "
            "array uint8[h, w, 3]",
        )
    encoded = isinstance(source, bytes)
    name = f"image of {len(source)} bytes" if encoded else f"image {str(source)!r}"
    if encoded:
        check_bytes(source, "image")
    else:
        source = check_path(source, "image")
    with io.BytesIO(source) if encoded else open_file(source, "image") as file:
        try:
            image = Image.open(file, formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadRecord(
                "hostile_media",
                f"{name} is too large ({error}), at most {MAX_PIXELS} pixels: shrink the file",
            ) from error
        except _DECODE_ERRORS as error:
            check_machine(error)
            raise BadRecord(
                "damaged_media",
                f"{name} is not a readable image ({error}); allowed formats are "
                f"{', '.join(FORMATS)}: convert it",
            ) from error
        yield image, name


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Returns the 8-bit RGB form of a decoded image."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadRecord(
            "damaged_media",
            f"{name} has 32-bit pixels (mode {image.mode}) of unknown range: convert it to 8 or "
            "16 bits",
        )
    return image.convert("RGB")
