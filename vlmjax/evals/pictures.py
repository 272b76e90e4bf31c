"""samples.png: held-out samples as the model sees them, what it was asked, said, and the truth.

The pictures are put together from the patches of each `Item`, after resizing. Patches that DiffFP
pruned, which never reach the language model, are dimmed. The answer of the model is green when it
is right, amber when a part of it is, red when it is wrong.
"""

from PIL import Image, ImageDraw

from vlmjax.data.sheet import FAINT, FONT, GAP, INK, LINE, PAPER, enlarge, font, pixels, wrap
from vlmjax.evals.swap import media

_WIDTH, _MARGIN = 1280, 16
_PER_ROW = {"multi_image": 2, "video": 2, "stream": 2}  # samples beside each other
_FEW = 4
_RIGHT, _PARTLY, _WRONG = "#0a7a2a", "#b06a00", "#c01818"
_LEGEND = (
    "held-out samples, the first of each task; answers are",
    ("right", _RIGHT),
    ("partly right", _PARTLY),
    ("wrong", _WRONG),
    "dimmed: pruned by DiffFP, not shown to the language model",
)


def draw(results):
    """Returns a PIL image with the first samples of each task, of a list of `TaskResult`s."""
    blocks = []
    for result in results:
        few = _PER_ROW.get(result.task, _FEW)
        width = (_WIDTH - 2 * _MARGIN) // few
        cells = [_cell(result, k, width) for k in range(min(few, len(result.scores)))]
        blocks.append((_title(result), cells, width))
    height = sum(2 * LINE + max(c.height for c in cells) + _MARGIN for _, cells, _ in blocks)
    page = Image.new("RGB", (_WIDTH, height + _MARGIN + 2 * LINE), PAPER)
    pen, x, y = ImageDraw.Draw(page), _MARGIN, _MARGIN + 2 * LINE
    for entry in _LEGEND:
        text, color = (entry, FAINT) if isinstance(entry, str) else entry
        pen.text((x, _MARGIN), text, fill=color, font=font(FONT))
        x += font(FONT).getlength(text) + FONT
    for title, cells, width in blocks:
        pen.line((_MARGIN, y, _WIDTH - _MARGIN, y), fill="#c0c0c0")
        pen.text((_MARGIN, y + 4), title, fill=INK, font=font(FONT + 3))
        y += 2 * LINE
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
    images = enlarge([pixels(item) for item in views], width - _MARGIN)
    lines = []
    for name, text, color in (
        ("", question, INK),
        ("says: ", result.predictions[number] or "(nothing)", rated),
        ("truth: ", record["answer"] or "(nothing)", FAINT),
    ):
        lines += [(line, color) for line in wrap(name + text, width - 2 * _MARGIN)]
    top = max([image.height for image in images], default=0) + GAP
    under = LINE if any(times) else 0
    cell = Image.new("RGB", (width, top + under + LINE * len(lines)), PAPER)
    pen, x = ImageDraw.Draw(cell), 0
    for image, time in zip(images, times, strict=True):
        cell.paste(image, (x, 0))
        pen.text((x, top), time, fill=FAINT, font=font(FONT - 2))
        x += image.width + GAP
    for k, (line, color) in enumerate(lines):
        pen.text((0, top + under + LINE * k), line, fill=color, font=font(FONT))
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
