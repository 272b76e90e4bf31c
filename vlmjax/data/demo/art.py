"""Small pictures, drawn once and kept: icons in two styles, letters, handwritten digits, photos.

Everything is numpy u8. A stamp is (ink u16[h, w, 3] already multiplied by its coverage, coverage
u16[h, w, 1] 0-255), so that placing it on a picture is one multiplication.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmjax.data.demo.classes import ICONS, PHOTOS, SHOTS

ASSETS = Path(__file__).parent / "assets"
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "Aileron")
_EMOJI = {"openmoji": ("openmoji/openmoji.ttf", 96), "noto": ("noto/noto.ttf", 109)}


@cache
def _icon(name: str, style: str) -> Image.Image:
    """Returns an icon as a square RGBA image, large."""
    file, size = _EMOJI[style]
    font = ImageFont.truetype(str(ASSETS / file), size)
    canvas = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(canvas).text((40, 40), chr(ICONS[name]), font=font, embedded_color=True)
    icon = canvas.crop(canvas.getbbox())
    side = max(icon.size)
    square = Image.new("RGBA", (side, side))
    square.paste(icon, ((side - icon.width) // 2, (side - icon.height) // 2))
    return square


@cache
def icon(name: str, style: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the stamp of an icon, size x size."""
    large = np.asarray(_icon(name, style), np.float32)
    large[..., :3] *= large[..., 3:] / 255
    bands = [Image.fromarray(large[..., k]) for k in range(4)]
    small = [np.asarray(b.resize((size, size), Image.Resampling.BOX)) for b in bands]
    small = np.stack(small, -1).clip(0, 255)
    return (small[..., :3] * 255).astype(np.uint16), small[..., 3:].astype(np.uint16)


@cache
def letter(font: str, size: int, text: str) -> np.ndarray:
    """Returns the coverage u16[h, w, 1] of a capital letter, cut to its ink."""
    if font == "Aileron":
        face = ImageFont.load_default(size=size)
    else:
        face = ImageFont.truetype(str(ASSETS / f"fonts/{font}.ttf"), size)
    canvas = Image.new("L", (64, 64))
    ImageDraw.Draw(canvas).text((16, 8), text, font=face, fill=255)
    return np.asarray(canvas.crop(canvas.getbbox()), np.uint16)[..., None]


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the handwritten glyphs u8[1797, 8, 8] (0-16) and their labels u8[1797]."""
    with np.load(ASSETS / "digits.npz") as data:
        return data["glyphs"], data["labels"]


@cache
def digit(index: int, size: int) -> np.ndarray:
    """Returns the coverage u16[size, size, 1] of a handwritten digit."""
    glyph = Image.fromarray((digits()[0][index] * 15.9).astype(np.uint8))
    return np.asarray(glyph.resize((size, size), Image.Resampling.BICUBIC), np.uint16)[..., None]


@cache
def photo(name: str) -> np.ndarray:
    """Returns a photograph u8[96, 96, 3]."""
    if name not in PHOTOS:
        raise ValueError(f"photo {name!r} is unknown, there are {PHOTOS}: choose one of them")
    return np.asarray(Image.open(ASSETS / f"photos/{name}.jpg").convert("RGB"))


@cache
def _clip(name: str) -> tuple[tuple[float, Image.Image], ...]:
    with av.open(str(ASSETS / f"clips/{name}.mp4")) as video:
        return tuple((float(f.time), f.to_image()) for f in video.decode(video=0))


@cache
def shot(name: str) -> tuple[tuple[float, Image.Image], ...]:
    """Returns the (seconds from the cut, 64x64 frame) pairs of a real shot."""
    clip, first, last = SHOTS[name]
    return tuple((t - first, image) for t, image in _clip(clip) if first <= t < last)


@cache
def shot_frame(name: str, index: int, left: int, top: int, side: int, size: int) -> np.ndarray:
    """Returns a square part of a shot's frame as u8[size, size, 3]."""
    part = shot(name)[index][1].crop((left, top, left + side, top + side))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))


def plain(height: int, width: int, color) -> np.ndarray:
    """Returns a picture u8[height, width, 3] of one colour."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = color
    return picture


def texture(rng: Random, name: str, height: int, width: int) -> np.ndarray:
    """Returns a random cut of a photograph, u8[height, width, 3]."""
    y, x = rng.randrange(97 - height), rng.randrange(97 - width)
    return photo(name)[y : y + height, x : x + width].copy()


def light(rng: Random) -> tuple[int, int, int]:
    """Returns a light colour."""
    return rng.randint(222, 255), rng.randint(222, 255), rng.randint(222, 255)


def dark(rng: Random) -> tuple[int, int, int]:
    """Returns a dark colour."""
    return rng.randint(0, 50), rng.randint(0, 50), rng.randint(0, 50)


def stamp(picture: np.ndarray, ink: np.ndarray, coverage: np.ndarray, y: int, x: int) -> None:
    """Places a stamp on a picture, in place; what leaves the picture is cut."""
    top, left = max(-y, 0), max(-x, 0)
    part = picture[max(y, 0) : y + ink.shape[0], max(x, 0) : x + ink.shape[1]]
    h, w = part.shape[:2]
    ink, coverage = ink[top : top + h, left : left + w], coverage[top : top + h, left : left + w]
    part[:] = (part * (255 - coverage) + ink) // 255


def write(picture: np.ndarray, coverage: np.ndarray, color, y: int, x: int) -> None:
    """Places a glyph of one colour on a picture, in place."""
    stamp(picture, coverage * np.array(color, np.uint16), coverage, y, x)
