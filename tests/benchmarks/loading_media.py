"""Photo-sized pictures and clips made of the demo's real ones, for the benchmark of loading."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

ASSETS = Path(__file__).parents[2] / "vlmjax/data/demo/assets"
PHOTO_SIZES = (640, 480), (480, 640), (1024, 768), (1280, 720), (768, 1024), (1920, 1080)
CLIP_SIZES = (640, 360), (480, 640), (854, 480), (1280, 720)
RATE, SECONDS = 25, 8


def _mosaic(tiles, width, height, scale):
    """Returns u8[height, width, 3]: the tiles enlarged and laid side by side, neighbours unlike."""
    side = tiles[0].width * scale
    large = [np.asarray(tile.resize((side, side), Image.Resampling.LANCZOS)) for tile in tiles]
    rows, columns = -(-height // side), -(-width // side)
    laid = [[large[(3 * r + c) % len(large)] for c in range(columns)] for r in range(rows)]
    return np.concatenate([np.concatenate(row, 1) for row in laid])[:height, :width]


def make_photos(folder):
    """Writes a JPEG of each of `PHOTO_SIZES`; returns their paths."""
    tiles = [Image.open(file).convert("RGB") for file in sorted(ASSETS.glob("photos/*.jpg"))]
    paths = []
    for number, (width, height) in enumerate(PHOTO_SIZES):
        paths.append(folder / f"{width}x{height}.jpg")
        turned = tiles[number % len(tiles) :] + tiles[: number % len(tiles)]
        picture = Image.fromarray(_mosaic(turned, width, height, 3))
        picture.save(paths[-1], quality=90)
    return paths


def _frames(file):
    with av.open(str(file)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def make_clips(folder):
    """Writes an H.264 clip of each of `CLIP_SIZES` that moves and pans; returns their paths."""
    clips = [_frames(file) for file in sorted(ASSETS.glob("clips/*.mp4"))]
    paths = []
    for width, height in CLIP_SIZES:
        paths.append(folder / f"{width}x{height}.mp4")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream("libx264", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for k in range(RATE * SECONDS):
                at = 4 * k // RATE  # the embedded clips have 4 frames a second
                tiles = [clip[at % len(clip)] for clip in clips]
                wide = _mosaic(tiles, width + 2 * k, height, 4)
                # The camera pans and rests in turn, so that some patches stay the same.
                shift = k if k // (2 * RATE) % 2 else 0
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(wide[:, shift : shift + width]), format="rgb24"
                )
                frame.pts, frame.time_base = k, Fraction(1, RATE)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return paths
