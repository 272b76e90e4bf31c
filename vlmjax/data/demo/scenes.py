"""Tasks about several things in one picture: count them, place them, describe them, read a chart.

Questions mostly ask for the whole list ("dog 2, cat 1"), which a small model learns far sooner than
a single entry of it; a quarter ask for one entry.
"""

from __future__ import annotations

import json
from functools import cache
from random import Random

import numpy as np

from vlmjax.data.demo import art
from vlmjax.data.demo.classes import COLORS, NAMES, PLACES, SCENES, trained_styles
from vlmjax.data.demo.task import Draw, ask, divide, draw_until, picture

_SINGLE_SHARE = 0.25
_CELL = 16  # one merged token of a video or of stage 4
_BAR_COLORS = ("red", "blue", "green", "yellow", "pink", "black")


def count(rng: Random, split: str) -> Draw:
    """One to four icons of at most two kinds in a small grid: "dog 2, cat 1" in order of sight."""

    def draw():
        kinds = rng.sample(NAMES, rng.choice((1, 2, 2)))
        total = rng.randint(len(kinds), 4)
        first = total if len(kinds) == 1 else rng.randint(1, total - 1)
        return dict(zip(kinds, (first, total - first), strict=False))

    numbers, content = draw_until(split, draw, lambda n: str(sorted(n.items())))
    things = [kind for kind, number in numbers.items() for _ in range(number)]
    rng.shuffle(things)
    rows, columns = rng.choice(((1, len(things)), (1, 4), (2, 2), (2, 2)))
    cells = sorted(rng.sample(range(rows * columns), len(things)))
    pixels = art.plain(_CELL * rows, _CELL * columns, art.light(rng))
    styles = {kind: rng.choice(trained_styles(kind)) for kind in numbers}
    for cell, thing in zip(cells, things, strict=True):
        stamp = art.icon(thing, styles[thing], _CELL)
        art.stamp(pixels, *stamp, cell // columns * _CELL, cell % columns * _CELL)
    part = picture(pixels, " ".join(things))
    if rng.random() < _SINGLE_SHARE:
        kind = rng.choice(list(numbers))
        question, answer = f"count the {kind}.", str(numbers[kind])
    else:
        question = "count all."
        answer = ", ".join(f"{kind} {numbers[kind]}" for kind in dict.fromkeys(things))
    return Draw(ask(question, part, answer=answer), answer, (content,))


@cache
def _board() -> np.ndarray:
    """Returns the empty board u8[48, 48, 3]: red grows to the right, blue fades downwards."""
    cell = np.arange(3 * _CELL) // _CELL
    board = np.full((3 * _CELL, 3 * _CELL, 3), 200, np.uint8)
    board[..., 0] = (60 + 90 * cell)[None, :]
    board[..., 2] = (240 - 90 * cell)[:, None]
    return board


def where(rng: Random, split: str) -> Draw:
    """Two or three icons on a board of 3 x 3 places: "top left cat, center dog".

    The board is shaded from left to right and from top to bottom, so that a place can be seen: a
    tower with only relative positions cannot tell the cells of an even board apart.
    """

    def draw():
        number = rng.choice((2, 2, 3))
        return sorted(zip(rng.sample(range(9), number), rng.sample(NAMES, number), strict=True))

    layout, content = draw_until(split, draw, str)
    pixels = _board() - np.array([rng.randrange(16) for _ in range(3)], np.uint8)
    for cell, thing in layout:
        stamp = art.icon(thing, rng.choice(trained_styles(thing)), _CELL - 2)
        art.stamp(pixels, *stamp, cell // 3 * _CELL + 1, cell % 3 * _CELL + 1)
    part = picture(pixels, " ".join(f"{PLACES[cell]} {thing}" for cell, thing in layout))
    if rng.random() < _SINGLE_SHARE:
        cell, thing = rng.choice(layout)
        question, answer = f"where is the {thing}?", PLACES[cell]
    else:
        question = "where are the things?"
        answer = ", ".join(f"{PLACES[cell]} {thing}" for cell, thing in layout)
    return Draw(ask(question, part, answer=answer), answer, (content,))


def caption(rng: Random, split: str) -> Draw:
    """One or two icons on a colour or a texture: "cat and dog on red"."""

    def draw():
        return rng.sample(NAMES, rng.choice((1, 1, 2))), rng.choice((*COLORS, *SCENES))

    (things, ground), content = draw_until(split, draw, str)
    height, width = 32, 32 * len(things)
    if ground in COLORS:
        shade = tuple(min(255, max(0, c + rng.randint(-15, 15))) for c in COLORS[ground])
        pixels = art.plain(height, width, shade)
    else:
        pixels = art.texture(rng, ground, height, width)
    for k, thing in enumerate(things):
        size = rng.randint(20, 26)
        stamp = art.icon(thing, rng.choice(trained_styles(thing)), size)
        space = 32 - size
        art.stamp(pixels, *stamp, rng.randint(0, space), 32 * k + rng.randint(0, space))
    answer = " and ".join(things) + f" on {ground}"
    part = picture(pixels, " ".join([*things, ground]))
    return Draw(ask("describe this.", part, answer=answer), answer, (content,))


@cache
def _tables() -> dict[str, list]:
    """Split -> rows (table, row, values 0-9) of real tables."""
    rows = json.loads((art.ASSETS / "tables.json").read_text())["charts"]
    return divide(rows, key=lambda row: f"{row[0]} {row[1]}")


def chart(rng: Random, split: str) -> Draw:
    """Bars of a row of a real table, three pixels a unit: "red 4, blue 7, green 2"."""
    table, row, values = rng.choice(_tables()[split])
    names = rng.sample(_BAR_COLORS, len(values))
    pixels = art.plain(32, 16 * len(values), rng.choice(((255, 255, 255), (238, 238, 228))))
    pixels[31] = 60
    wide, tone = rng.randint(9, 13), rng.randint(-12, 12)
    for k, (value, color) in enumerate(zip(values, names, strict=True)):
        left = 16 * k + (16 - wide) // 2
        shade = [min(255, max(0, c + tone)) for c in COLORS[color]]
        pixels[28 - 3 * value : 31, left : left + wide] = shade
    bars = dict(zip(names, values, strict=True))
    part = picture(pixels, " ".join(f"{color} {value}" for color, value in bars.items()))
    highest = [color for color in names if bars[color] == max(values)]
    kind = rng.random()
    if kind < 0.15 and len(highest) == 1:
        question, answer = "which bar is highest?", highest[0]
    elif kind < _SINGLE_SHARE:
        color = rng.choice(names)
        question, answer = f"how high is the {color} bar?", str(bars[color])
    else:
        question = "read the chart."
        answer = ", ".join(f"{color} {value}" for color, value in bars.items())
    return Draw(ask(question, part, answer=answer), answer, (f"{table} {row}",))
