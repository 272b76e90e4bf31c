"""A picture of samples: views as the model sees them, pruned patches dimmed, and their chats.

What is trained is green, a run of visual tokens is a blue label with their number, everything else
is black. Long chats are cut in the middle.
"""

from itertools import groupby

from PIL import Image, ImageDraw

from vlmjax.data.inspection import MODALITIES
from vlmjax.data.sheet import FAINT, FONT, GAP, INK, LINE, PAPER, font, pixels

_WIDTH, _MARGIN, _COLUMNS = 1280, 16, 2
_TALL, _SMALL = 150, 72  # pixels of a view's height at most; where there are more than a few
_FEW = 4
_VIEWS = 24  # of a sample that are shown
_HEAD, _TAIL = 12, 8  # lines of a chat that is cut
_SHOWN = 4  # samples of a source
_TRAINED, _VISUAL, _SEAM = ("#06501a", "#cdf3d3"), ("#123f8f", "#dbe7ff"), "#c0c0c0"
_LEGEND = (
    ("black: read", INK, PAPER),
    ("green: trained", *_TRAINED),
    ("[visual tokens]", *_VISUAL),
    ("dimmed: pruned by DiffFP, never shown to the language model", FAINT, PAPER),
)


def draw(surveys, tokenizer):
    """Returns a PIL image of some samples of each `Survey`, of each kind at first."""
    blocks = []
    for survey in surveys:
        cells = [_cell(seen, tokenizer) for seen in _chosen(survey.seen)]
        rows = [cells[k : k + _COLUMNS] for k in range(0, len(cells), _COLUMNS)]
        blocks.append((survey.spec, [(row, max(c.height for c in row)) for row in rows]))
    height = sum(2 * LINE + sum(tall + _MARGIN for _, tall in rows) for _, rows in blocks)
    page = Image.new("RGB", (_WIDTH, height + 3 * LINE + _MARGIN), PAPER)
    pen, x, y = ImageDraw.Draw(page), _MARGIN, 3 * LINE
    for text, ink, paper in _LEGEND:
        x = _label(pen, x, _MARGIN, text, ink, paper) + 2 * FONT
    for spec, rows in blocks:
        pen.line((_MARGIN, y, _WIDTH - _MARGIN, y), fill=_SEAM)
        pen.text((_MARGIN, y + 4), _short(spec, 120), fill=INK, font=font(FONT + 3))
        y += 2 * LINE
        for cells, tall in rows:
            for number, cell in enumerate(cells):
                page.paste(cell, (_MARGIN + number * (_WIDTH - 2 * _MARGIN) // _COLUMNS, y))
            y += tall + _MARGIN
    return page


def _chosen(seen):
    """Returns a few: the first of each kind, then others, in order."""
    first = [next((s for s in seen if s.modality == m), None) for m in MODALITIES]
    first = [s for s in first if s is not None]
    others = [s for s in seen if not any(s is f for f in first)]
    return (first + others)[: max(_SHOWN, len(first))]


def _cell(seen, tokenizer):
    """Returns one sample: a heading, its views and its chat."""
    width = (_WIDTH - 2 * _MARGIN) // _COLUMNS - _MARGIN
    views = [item for item in seen.sample.items if item.encoder == 0]
    tall = _TALL if len(views) <= _FEW else _SMALL
    images, under = _flow([_fit(pixels(item), width, tall) for item in views[:_VIEWS]], width)
    lines = _lines(_runs(seen.sample, tokenizer), width)
    sizes = ", ".join(f"{number} {name}" for name, number in seen.sizes.items())
    if seen.modality in ("video", "stream"):
        sizes += f", {seen.pruned:.0%} pruned"
    if len(views) > _VIEWS:
        sizes += f"; {_VIEWS} of {len(views)} views shown"
    heading = (_short(seen.name, 60), f"{seen.modality}: {sizes}")
    top = len(heading) * LINE + GAP
    cell = Image.new("RGB", (width, top + under + LINE * len(lines) + GAP), PAPER)
    pen = ImageDraw.Draw(cell)
    for k, text in enumerate(heading):
        pen.text((0, k * LINE), text, fill=FAINT, font=font(FONT - 1))
    for image, (x, y) in images:
        cell.paste(image, (x, top + y))
    for k, line in enumerate(lines):
        x, y = 0, top + under + GAP + LINE * k
        for text, ink, paper in line:
            x = _label(pen, x, y, text, ink, paper)
    return cell


def _label(pen, x, y, text, ink, paper):
    """Draws a text on its background; returns where it ends."""
    end = x + font(FONT).getlength(text)
    if paper != PAPER:
        pen.rectangle((x, y, end, y + LINE - 2), fill=paper)
    pen.text((x, y), text, fill=ink, font=font(FONT))
    return end


def _fit(array, width, tall):
    """Returns a PIL image at most so wide and tall; small ones have square pixels."""
    height, wide = array.shape[:2]
    scale = min(tall / height, width / wide)
    if scale >= 2:
        size = wide * int(scale), height * int(scale)
        return Image.fromarray(array).resize(size, Image.Resampling.NEAREST)
    if scale >= 1:
        return Image.fromarray(array)
    size = max(int(wide * scale), 1), max(int(height * scale), 1)
    return Image.fromarray(array).resize(size, Image.Resampling.BOX)


def _flow(images, width):
    """Returns ([(image, (x, y))], height) of images side by side, in as many rows as needed."""
    placed, x, y, tall = [], 0, 0, 0
    for image in images:
        if x and x + image.width > width:
            x, y, tall = 0, y + tall + GAP, 0
        placed.append((image, (x, y)))
        x, tall = x + image.width + GAP, max(tall, image.height)
    return placed, y + tall


def _runs(sample, tokenizer):
    """Yields (text, ink, paper) of the neighbouring tokens of one kind."""
    places = zip(sample.tokens, sample.labels >= 0, sample.visual, strict=True)
    for (trained, visual), run in groupby(places, key=lambda place: (place[1], place[2])):
        ids = [token for token, _, _ in run]
        if visual:
            yield (f"[{len(ids)} visual]", *_VISUAL)
        else:
            colors = _TRAINED if trained else (INK, PAPER)
            yield (tokenizer.decode(ids, skip_special=False), *colors)


def _lines(runs, width):
    """Returns lines of (text, ink, paper) that fit a width, the middle of many left out."""
    lines, x, letters = [[]], 0.0, font(FONT)
    for text, *colors in runs:
        for number, line in enumerate(text.split("\n")):
            if number:
                lines.append([])
                x = 0.0
            for word in _words(line, letters, width):
                long = letters.getlength(word)
                if lines[-1] and x + letters.getlength(word.rstrip()) > width:
                    lines.append([])
                    x = 0.0
                lines[-1].append((word, *colors))
                x += long
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    left_out = len(lines) - _HEAD - _TAIL
    if left_out > 1:
        note = (f"... {left_out} lines ...", FAINT, PAPER)
        lines = [*lines[:_HEAD], [note], *lines[-_TAIL:]]
    return lines


def _words(text, letters, width):
    """Returns the words of a line, each with the spaces behind it, none wider than the page."""
    words = []
    for word in text.replace(" ", " \0").split("\0"):
        while letters.getlength(word) > width:
            some = next(k for k in range(1, len(word)) if letters.getlength(word[: k + 1]) > width)
            words.append(word[:some])
            word = word[some:]
        words.append(word)
    return [word for word in words if word]


def _short(text, most):
    return text if len(text) <= most else f"...{text[3 - most :]}"
