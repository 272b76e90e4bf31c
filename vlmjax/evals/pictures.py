"""samples.png: held-out samples as the model sees them, what it was asked, said, and the truth.

The pictures are put together from the patches of each `Item`, after resizing. Patches that DiffFP
pruned, which never reach the language model, are dimmed. The answer of the model is green when it
is right, amber when a part of it is, red when it is wrong.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmjax.evals.swap import media

_WIDTH, _MARGIN, _GAP = 1280, 16, 4
_HEIGHT = 96  # of a picture, at least
_FONT, _LINE = 14, 18
_PER_ROW = {"multi_image": 2, "video": 2, "stream": 2}  # samples beside each other
_FEW = 4
_PAPER, _INK, _FAINT = "white", "black", "#606060"
_RIGHT, _PARTLY, _WRONG = "#0a7a2a", "#b06a00", "#c01818"
_LEGEND = (
    "held-out samples, the first of each task; answers are",
    ("right", _RIGHT),
    ("partly right", _PARTLY),
    ("wrong", _WRONG),
    "dimmed: pruned by DiffFP, not shown to the language model",
)


def pixels(item):
    """Returns u8[h * p, w * p, 3]: an `Item` as its encoder sees it, pruned parts dimmed."""
    (h, w), merge, patch = item.grid, item.merge, math.isqrt(item.patches.shape[1] // 3)
    rows = item.patches.reshape(-1, merge**2, 3, patch, patch)
    rows = np.where(item.keep[:, None, None, None, None], rows, rows // 4 + 150)
    grid = rows.reshape(h // merge, w // merge, merge, merge, 3, patch, patch)
    return grid.transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * patch, w * patch, 3).astype(np.uint8)


def draw(results):
    """Returns a PIL image with the first samples of each task, of a list of `TaskResult`s."""
    blocks = []
    for result in results:
        few = _PER_ROW.get(result.task, _FEW)
        width = (_WIDTH - 2 * _MARGIN) // few
        cells = [_cell(result, k, width) for k in range(min(few, len(result.scores)))]
        blocks.append((_title(result), cells, width))
    height = sum(2 * _LINE + max(c.height for c in cells) + _MARGIN for _, cells, _ in blocks)
    page = Image.new("RGB", (_WIDTH, height + _MARGIN + 2 * _LINE), _PAPER)
    pen, x, y = ImageDraw.Draw(page), _MARGIN, _MARGIN + 2 * _LINE
    for entry in _LEGEND:
        text, color = (entry, _FAINT) if isinstance(entry, str) else entry
        pen.text((x, _MARGIN), text, fill=color, font=_font(_FONT))
        x += _font(_FONT).getlength(text) + _FONT
    for title, cells, width in blocks:
        pen.line((_MARGIN, y, _WIDTH - _MARGIN, y), fill="#c0c0c0")
        pen.text((_MARGIN, y + 4), title, fill=_INK, font=_font(_FONT + 3))
        y += 2 * _LINE
        for number, cell in enumerate(cells):
            page.paste(cell, (_MARGIN + number * width, y))
        y += max(cell.height for cell in cells) + _MARGIN
    return page


def _title(result):
    return f"{result.task}:  score {result.scores.mean():.2f},  chance {result.chance:.2f}"


def _cell(result, number, width):
    """Returns one sample: what the first encoder sees, side by side, and below that the words.

    Frames have their times under them where a frame is one view.
    """
    record, score = result.records[number], result.scores[number]
    rated = _RIGHT if score == 1 else _PARTLY if score else _WRONG
    times, question = _words(record)
    views = [item for item in result.samples[number].items if item.encoder == 0]
    times = times if len(times) == len(views) else [""] * len(views)
    images = _enlarge([pixels(item) for item in views], width)
    lines = []
    for name, text, color in (
        ("", question, _INK),
        ("says: ", result.predictions[number] or "(nothing)", rated),
        ("truth: ", record["answer"] or "(nothing)", _FAINT),
    ):
        lines += [(line, color) for line in _wrap(name + text, width - 2 * _MARGIN)]
    top = max([image.height for image in images], default=0) + _GAP
    under = _LINE if any(times) else 0
    cell = Image.new("RGB", (width, top + under + _LINE * len(lines)), _PAPER)
    pen, x = ImageDraw.Draw(cell), 0
    for image, time in zip(images, times, strict=True):
        cell.paste(image, (x, 0))
        pen.text((x, top), time, fill=_FAINT, font=_font(_FONT - 2))
        x += image.width + _GAP
    for k, (line, color) in enumerate(lines):
        pen.text((0, top + under + _LINE * k), line, fill=color, font=_font(_FONT))
    return cell


def _words(record):
    """Returns (times of the frames, the question) of a record; [] for pictures without times."""
    times = []
    for part in media(record):
        times += part["timestamps"] if part["type"] == "video" else [part.get("time")]
    question = record["messages"][0]["content"]
    if not isinstance(question, str):
        question = question[-1]["text"]
    return [f"{time:.1f}s" for time in times if time is not None], question


def _enlarge(arrays, width):
    """Returns PIL images about `_HEIGHT` high that fit side by side, each pixel a square."""
    room = width - _MARGIN - _GAP * len(arrays)
    most = room // max(sum(array.shape[1] for array in arrays), 1)
    images = []
    for array in arrays:
        height, wide = array.shape[:2]
        scale = max(min(round(_HEIGHT / height), most), 1)
        size = wide * scale, height * scale
        images.append(Image.fromarray(array).resize(size, Image.Resampling.NEAREST))
    return images


def _wrap(text, width):
    """Returns the lines of a text that is broken at spaces to fit a width in pixels."""
    lines, font = [""], _font(_FONT)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _font(size):
    return ImageFont.load_default(size)
