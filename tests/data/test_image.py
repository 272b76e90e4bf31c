"""Which images are accepted, how they become RGB, and parity with transformers."""

import errno
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torchvision_shim
from PIL import Image, ImageFile

from vlmjax.data import image as images
from vlmjax.data.annotation import media_path
from vlmjax.data.health import BadRecord
from vlmjax.data.image import MAX_PIXELS, image_size, load_image
from vlmjax.data.resize import Clip, patch_rows, resize_transformers

torchvision_shim.install()
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (9, 14, 3), dtype=np.uint8)


def png_header(width, height):
    """Returns a valid PNG of 60 bytes that claims to be huge."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_sources_agree(tmp_path):
    image = Image.fromarray(PIXELS)
    path = tmp_path / "a.png"
    image.save(path)
    for source in (PIXELS, image, path, str(path), path.read_bytes()):
        assert image_size(source) == (9, 14)
        np.testing.assert_array_equal(np.asarray(load_image(source)), PIXELS)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBA", "CMYK", "1", "YCbCr", "HSV"])
def test_modes_convert_plainly(mode):
    image = Image.fromarray(PIXELS).convert("L" if mode in ("PA", "LA") else mode)
    image = image.convert(mode)
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_and_exif_not_applied():
    alpha = np.dstack([PIXELS, np.zeros_like(PIXELS[..., :1])])
    data = encoded(Image.fromarray(alpha), "PNG")
    np.testing.assert_array_equal(np.asarray(load_image(data)), PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)
    assert load_image(turned).size == (14, 9)


def test_sixteen_bit_grey_keeps_its_range():
    deep = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    data = encoded(Image.fromarray(deep), "PNG")
    assert np.asarray(load_image(data))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    with pytest.raises(ValueError, match="32-bit pixels"):
        load_image(Image.fromarray(np.zeros((4, 4), np.float32)))


@pytest.mark.parametrize(
    "data,message",
    [
        (png_header(40000, 40000), "too large"),
        (png_header(10000, 9000), f"too large|at most {MAX_PIXELS}"),
        (png_header(1, 100000), "1x100000, the aspect ratio may be at most 200"),
        (b"not an image", "not a readable image.*allowed formats are PNG"),
        (b"", "is empty"),
        (encoded(Image.fromarray(PIXELS), "ICO", sizes=[(14, 9)]), "not a readable image"),
        (encoded(Image.fromarray(PIXELS), "PNG")[:-60], "damaged or truncated"),
        (encoded(Image.fromarray(np.tile(PIXELS, (9, 9, 1))), "JPEG")[:900], "truncated"),
    ],
)
def test_bad_files_are_refused(tmp_path, data, message):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ValueError, match=message):
            load_image(source)


@pytest.mark.parametrize(
    "source,message",
    [
        ("https://example.com/a.png", "is a URL, only local files"),
        ("no/such.png", "is not a file"),
        (np.zeros((4, 4), np.uint8), r"uint8\[4, 4\], uint8\[h, w, 3\] is needed"),
        (np.zeros((4, 4, 3), np.float32), r"float32\[4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "both sides must be at least 1"),
        (np.zeros((1, 201, 3), np.uint8), "aspect ratio"),
        (Image.new("RGB", (1, 300)), "aspect ratio"),
        (3, "image source is a int"),
    ],
)
def test_bad_sources_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_rows_are_window_major_and_channel_major():
    image = np.zeros((4, 8, 3), np.uint8)
    rows, columns = np.mgrid[:4, :8]
    image[..., 0], image[..., 1] = rows, columns
    found = patch_rows(Image.fromarray(image), (4, 8), patch=1, merge=2)
    assert found[:8, :2].tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
        [0, 2],
        [0, 3],
        [1, 2],
        [1, 3],
    ]
    found = patch_rows(Image.fromarray(image), (4, 8), patch=2, merge=1)
    assert found[0].tolist() == [0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("size", [(40, 40), (300, 17), (333, 500)])
def test_parity_with_the_transformers_image_processor(make_processor, merge, size):
    module = pytest.importorskip(
        "transformers.models.video_llama_3.image_processing_pil_video_llama_3"
    )
    pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    factor = (14 * merge) ** 2
    theirs = module.VideoLlama3ImageProcessorPil(
        merge_size=merge, size={"shortest_edge": 16 * factor, "longest_edge": 64 * factor}
    )(Image.fromarray(pixels), return_tensors="np")
    process = make_processor(image_merge=merge, max_visual_tokens=64, resize="transformers")
    part = {"type": "image", "image": pixels}
    (item,) = process.prompt([{"role": "user", "content": [part]}]).items
    assert (1, *item.grid) == tuple(theirs["image_grid_thw"][0])
    levels = np.rint((theirs["pixel_values"] + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(item.patches, levels)


def test_parity_with_the_transformers_video_resize():
    module = pytest.importorskip(
        "transformers.models.video_llama_3.image_processing_pil_video_llama_3"
    )
    for height, width, frames in RNG.integers([20, 20, 1], [2000, 2000, 181], (300, 3)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        limits = dict(min_pixels=16 * 28**2, max_pixels=16384 * 28**2 // frames)
        expected = module.smart_resize(height, width, 28, **limits)
        clip = Clip(height, width, frames, 2)
        found = resize_transformers([clip], patch=14, min_tokens=16, max_tokens=16384)
        assert found == [expected]


@pytest.mark.parametrize("name", ["EMFILE", "EIO", "ESTALE", "ETIMEDOUT", "ENOMEM"])
def test_errors_of_the_machine_are_none_of_the_record(tmp_path, monkeypatch, name):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))

    def fail(*args, **kwargs):
        raise OSError(getattr(errno, name), "of the machine")

    for place in ((images, "open"), (Path, "stat"), (Image, "open"), (ImageFile.ImageFile, "load")):
        with monkeypatch.context() as patch:
            patch.setattr(*place, fail, raising=False)
            with pytest.raises(OSError, match="of the machine"):
                load_image(media_path(tmp_path, "a.png"))


def test_a_file_that_may_not_be_read_is_a_bad_record(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))

    def fail(*args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(images, "open", fail, raising=False)
    with pytest.raises(BadRecord, match="Permission denied.: check its permissions") as caught:
        load_image(path)
    assert caught.value.reason == "missing_file"


@pytest.mark.parametrize("progressive", [False, True])
def test_scans_of_a_jpeg_are_counted_and_limited(progressive):
    """Marker bytes inside of other segments and behind the end are none."""
    small = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x010E] = "\xff\xda" * 200
    data = encoded(small, "JPEG", progressive=progressive, exif=exif) + b"\xff\xda\0\x02" * 200
    start = data.rindex(b"\xff\xda", 0, data.index(b"\xff\xd9"))
    scan = data[start : data.index(b"\xff\xd9")]
    assert load_image(data).size == small.size
    with pytest.raises(BadRecord, match="has 1.. scans, at most 100 are decoded") as caught:
        load_image(data[:start] + scan * 120 + data[start:])
    assert caught.value.reason == "hostile_media"
