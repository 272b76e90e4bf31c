"""Tasks with one thing to say: name the icon, read the digits, read the word."""

from __future__ import annotations

from functools import cache
from random import Random
from string import ascii_uppercase

from vlmjax.data.demo import art
from vlmjax.data.demo.classes import HELD_STYLES, NAMES, PHOTOS, SHOTS, trained_styles
from vlmjax.data.demo.task import Draw, ask, divide, draw_until, picture

_SIZES = ((32, 32),) * 5 + ((32, 48), (48, 32))  # (height, width)
_SHOT_SHARE = 0.08
_LAYOUTS = ("line",) * 6 + ("lines", "lines", "tall", "tall", "framed", "natural")
_CELL = 16  # a glyph; one merged token


def name(rng: Random, split: str) -> Draw:
    """One icon, any place and size, on a colour or a photograph; or a frame of a real shot."""
    if rng.random() < _SHOT_SHARE:
        return _name_shot(rng, split)

    def draw():
        label = rng.choice(NAMES)
        return label, rng.choice(trained_styles(label)), *_placement(rng)

    return _name_icon(rng, *draw_until(split, draw, str))


def name_cross(rng: Random, split: str) -> Draw:
    """The icons in the drawing style that training never shows for them."""

    def draw():
        label = rng.choice(tuple(HELD_STYLES))
        return label, HELD_STYLES[label], *_placement(rng)

    return _name_icon(rng, *draw_until(split, draw, str))


def _placement(rng: Random):
    height, width = rng.choice(_SIZES)
    size = rng.randint(26, min(height, width, 36))
    return height, width, size, rng.randint(0, height - size), rng.randint(0, width - size)


def _name_icon(rng: Random, place, content: str) -> Draw:
    label, style, height, width, size, y, x = place
    if rng.random() < 0.12:
        pixels = art.texture(rng, rng.choice(PHOTOS), height, width)
    else:
        pixels = art.plain(height, width, art.light(rng))
    art.stamp(pixels, *art.icon(label, style, size), y, x)
    messages = ask("what is this?", picture(pixels, label), answer=label)
    return Draw(messages, label, (content,))


def _name_shot(rng: Random, split: str) -> Draw:
    label = rng.choice(tuple(SHOTS))
    index = rng.choice(shot_frames(label, split))
    pixels = shot_crop(rng, label, index)
    messages = ask("what is this?", picture(pixels, label), answer=label)
    return Draw(messages, label, (f"{label} frame {index}",))


def shot_frames(label: str, split: str) -> range:
    """Returns the frames of a shot that a split may show; the last quarter is for testing."""
    count = len(art.shot(label))
    cut = count * 3 // 4
    return range(cut) if split == "train" else range(cut, count)


def shot_crop(rng: Random, label: str, index: int, size: int = 32):
    """Returns a random square of a frame, u8[size, size, 3]."""
    side = rng.choice((48, 56, 64))
    step = (64 - side) // 2
    return art.shot_frame(
        label, index, rng.randrange(3) * step, rng.randrange(3) * step, side, size
    )


@cache
def _glyphs() -> dict[str, dict[int, list[int]]]:
    """Split -> digit -> glyph ids; the last fifth of each class, other writers, is for testing."""
    pools: dict[str, dict[int, list[int]]] = {"train": {}, "test": {}}
    labels = art.digits()[1]
    for value in range(10):
        ids = [int(i) for i in (labels == value).nonzero()[0]]
        cut = len(ids) * 4 // 5
        pools["train"][value], pools["test"][value] = ids[:cut], ids[cut:]
    return pools


def digit(rng: Random, split: str) -> Draw:
    """One handwritten digit: the first step towards `digits`."""
    return digits(rng, split, (1,))


def digits(rng: Random, split: str, lengths: tuple[int, ...] = (1, 2, 2, 3, 3)) -> Draw:
    """One to three handwritten digits in a row."""
    values = [rng.randrange(10) for _ in range(rng.choice(lengths))]
    glyphs = [rng.choice(_glyphs()[split][v]) for v in values]
    height, width, y, x = _CELL, _CELL * len(values), 0, 0
    if rng.random() < 0.15:  # on a larger page
        height, width, y, x = height + _CELL, width + _CELL, *_corner(rng)
    pixels = art.plain(height, width, art.light(rng))
    ink = art.dark(rng)
    for k, glyph in enumerate(glyphs):
        art.write(pixels, art.digit(glyph, _CELL), ink, y, x + k * _CELL)
    answer = "".join(map(str, values))
    messages = ask("read the digits.", picture(pixels, " ".join(answer)), answer=answer)
    return Draw(messages, answer, tuple(f"glyph {g}" for g in glyphs))


@cache
def words() -> dict[str, dict[int, list[str]]]:
    """Split -> length -> real words of that many capital letters."""
    pools = divide((art.ASSETS / "words.txt").read_text().split())
    return {
        split: {n: [w for w in pool if len(w) == n] for n in range(2, 7)}
        for split, pool in pools.items()
    }


def letter(rng: Random, split: str) -> Draw:
    """One capital letter in a real font: the first step towards `ocr`."""

    def draw():
        return rng.choice(ascii_uppercase), *_typeface(rng)

    (character, font, size), content = draw_until(split, draw, str)
    return _text(rng, character, font, size, content)


def ocr(rng: Random, split: str) -> Draw:
    """A real word in a real font: a line, two lines, a column, or with natural spacing."""
    length = rng.choice((2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6))
    word = rng.choice(words()[split][length])
    return _text(rng, word, *_typeface(rng), word)


def _typeface(rng: Random) -> tuple[str, int]:
    return rng.choice(art.FONTS), rng.randint(14, 17)


def _text(rng: Random, word: str, font: str, size: int, content: str) -> Draw:
    layout = rng.choice(_LAYOUTS)
    if layout == "lines" and len(word) < 4:
        layout = "line"
    glyphs = [art.letter(font, size, c) for c in word]
    ink, paper = art.dark(rng), art.light(rng)
    if layout == "natural":
        pixels = _write_natural(rng, glyphs, ink, paper)
    else:
        pixels = _write_cells(rng, glyphs, layout, ink, paper)
    messages = ask("read the text.", picture(pixels, " ".join(word)), answer=word)
    return Draw(messages, word, (content,))


def _write_cells(rng: Random, glyphs, layout: str, ink, paper):
    """Letters centred in cells, the whole word moved by at most a pixel."""
    count = len(glyphs)
    columns = {"tall": 1, "lines": (count + 1) // 2}.get(layout, count)
    rows = -(-count // columns)
    y, x = rng.choice((-1, 0, 0, 0, 1)), rng.choice((-1, 0, 0, 0, 1))
    height, width = _CELL * rows, _CELL * columns
    if layout == "framed":
        height, width, y, x = height + _CELL, width + _CELL, *_corner(rng)
    pixels = art.plain(height, width, paper)
    for k, glyph in enumerate(glyphs):
        row, column = divmod(k, columns)
        h, w = glyph.shape[:2]
        art.write(
            pixels,
            glyph,
            ink,
            y + _CELL * row + (_CELL - h) // 2,
            x + _CELL * column + (_CELL - w) // 2,
        )
    return pixels


def _write_natural(rng: Random, glyphs, ink, paper):
    """Letters side by side, two pixels apart, on a common base line."""
    total = sum(g.shape[1] + 2 for g in glyphs)
    width = -(-total // 16) * 16
    pixels = art.plain(16, width, paper)
    x, base = rng.randint(0, width - total), rng.randint(13, 15)
    for glyph in glyphs:
        art.write(pixels, glyph, ink, base - glyph.shape[0], x)
        x += glyph.shape[1] + 2
    return pixels


def _corner(rng: Random) -> tuple[int, int]:
    """Returns where something one cell smaller than its page stands: (y, x), whole cells."""
    return _CELL * rng.randrange(2), _CELL * rng.randrange(2)
