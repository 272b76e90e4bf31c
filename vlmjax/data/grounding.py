"""Boxes in pictures and spans of time, written as the text of a system.

In a message they are parts, the same for every system:

    {"type": "ref", "text": "the dog"}                     a phrase that a box belongs to
    {"type": "box", "boxes": [[0.1, 0.2, 0.5, 1.0]], "size": (640, 480)}    fractions of the picture
    {"type": "span", "span": [1.0, 2.0]}                   seconds

With "internvl" the first two become `<ref>the dog</ref><box>[[100, 200, 500, 1000]]</box>`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmjax.data.health import BadRecord
from vlmjax.data.templates import TEXT, split_controls

PARTS = ("box", "span", "ref")
FRAMES = ("picture", "square")


@dataclass(frozen=True)
class Grounding:
    """How a system writes boxes and spans.

    Attributes:
      box: x1, y1, x2 and y2 of a box.
      around: what comes before and after the boxes of one phrase.
      between: what separates them.
      scale: what a coordinate of 1 becomes.
      top: the largest coordinate.
      number: format of a coordinate.
      frame: coordinates are relative to the "picture", or to the "square" it is padded to.
      phrase: what comes before and after a phrase.
      span: start and end in seconds.
      controls: the control tokens in all of these texts.
    """

    box: str = "[{}, {}, {}, {}]"
    around: tuple[str, str] = ("", "")
    between: str = ", "
    scale: int = 1000
    top: int = 1000
    number: str = ".0f"
    frame: str = "picture"
    phrase: tuple[str, str] = ("", "")
    span: str = "{:.1f} - {:.1f} s"
    controls: tuple[str, ...] = ()

    def __post_init__(self):
        if self.frame not in FRAMES:
            raise ValueError(f"frame is {self.frame!r}: use one of {FRAMES}")

    def pieces(self, part: dict) -> list[tuple[str, str]]:
        """Returns the [(kind, value)] of a part."""
        if part["type"] == "span":
            return [(TEXT, self.span.format(*part["span"]))]
        if part["type"] == "box":
            boxes = self.between.join(self._box(box, part.get("size")) for box in part["boxes"])
            return split_controls(boxes.join(self.around), self.controls)
        before, after = (split_controls(text, self.controls) for text in self.phrase)
        return [*before, (TEXT, part["text"]), *after]  # the phrase is not ours, so never control

    def _box(self, box, size):
        if self.frame == "square":
            box = squared(box, size)
        return self.box.format(*(format(min(v * self.scale, self.top), self.number) for v in box))


def squared(box, size):
    """Returns a box as fractions of the square that a picture is centred in, as LLaVA pads it."""
    if size is None:
        raise BadRecord(
            "malformed", "a box relative to a padded square needs 'image_size': add [width, height]"
        )
    side = max(size)
    size, offsets = list(size) * 2, [(side - length) // 2 for length in size] * 2
    return [
        (v * length + offset) / side for v, length, offset in zip(box, size, offsets, strict=True)
    ]


# Where a format was read; what is not said there is marked with (?).
GROUNDING = {
    # The paper (arXiv:2501.13106) has {Text}<box>[{coordinates}]</box> and "1.0-2.0 s"; issue 50 of
    # its repository shows whole numbers up to 1000. Separators, and several boxes (?).
    "videollama3": Grounding(box="<box>[{}, {}, {}, {}]</box>", between="", span="{:.1f}-{:.1f} s"),
    # "Chat Data Format" of the documentation; the four marks are tokens in added_tokens.json.
    "internvl": Grounding(
        around=("<box>[", "]</box>"),
        phrase=("<ref>", "</ref>"),
        controls=("<ref>", "</ref>", "<box>", "</box>"),
    ),
    # README of CogVLM and arXiv:2311.03079, figure "Grounding with Caption": [[028,820,986,997]].
    "cogvlm": Grounding(
        box="{},{},{},{}", around=("[[", "]]"), between=";", top=999, number="03.0f"
    ),
    # llava_v1_5_mix665k; relative to the padded square: issues 606 and 822 of LLaVA. Several boxes
    # of one phrase (?).
    "llava": Grounding(scale=1, top=1, number=".2f", frame="square"),
    # Issues 1896 and 2535 of ms-swift, issue 866 of Qwen3-VL: in thousandths, one pair of marks for
    # each box.
    "qwen2_vl": Grounding(
        box="<|box_start|>({},{}),({},{})<|box_end|>",
        between="",
        top=999,
        phrase=("<|object_ref_start|>", "<|object_ref_end|>"),
        controls=(
            "<|box_start|>",
            "<|box_end|>",
            "<|object_ref_start|>",
            "<|object_ref_end|>",
        ),
    ),
}


def box_part(boxes, size=None) -> dict:
    """Returns the part of one box, or of several that belong to one phrase.

    Args:
      boxes: [x1, y1, x2, y2] or a list of them: pixels with a size, fractions without.
      size: (width, height) of the picture.
    """
    if isinstance(boxes, (list, tuple)) and boxes and not isinstance(boxes[0], (list, tuple)):
        boxes = [boxes]
    part = {"type": "box", "boxes": boxes, "size": size}
    check_part(part, size)
    scale = (size or (1, 1)) * 2
    part["boxes"] = [
        [min(max(v / s, 0.0), 1.0) for v, s in zip(box, scale, strict=True)] for box in boxes
    ]
    return part


def check_part(part: dict, limits=None) -> None:
    """Raises BadRecord unless a part is well-formed; boxes may lead 1 % out of the picture.

    Args:
      part: a box, span or ref.
      limits: (width, height) that boxes are in; None = fractions.
    """
    if part["type"] == "ref":
        if not isinstance(part.get("text"), str):
            raise BadRecord("malformed", "a ref part has no text: give the phrase")
    elif part["type"] == "span":
        if not _numbers(part.get("span"), 2) or not 0 <= part["span"][0] <= part["span"][1]:
            raise BadRecord(
                "malformed", f"span {part.get('span')!r} is no [start, end] in seconds: correct it"
            )
    else:
        size, boxes = part.get("size"), part.get("boxes")
        if size is not None and not (_numbers(size, 2) and min(size) >= 1):
            raise BadRecord("malformed", f"image_size {size!r} is no [width, height]: correct it")
        if not isinstance(boxes, (list, tuple)) or not boxes:
            raise BadRecord("malformed", f"boxes {boxes!r} are none: give [x1, y1, x2, y2]")
        for box in boxes:
            if not _numbers(box, 4) or not _inside(box, limits or (1, 1)):
                raise BadRecord(
                    "malformed",
                    f"box {box!r} is no [x1, y1, x2, y2] inside a picture of {limits or (1, 1)}: "
                    "correct it, or give pixels with 'image_size'",
                )


def _numbers(values, count):
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(isinstance(v, (int, float, np.number)) and -1e9 < v < 1e9 for v in values)
    )


def _inside(box, limits):
    (x1, y1, x2, y2), (width, height) = box, limits
    axes = (x1, x2, width), (y1, y2, height)
    return all(-0.01 * most <= low <= high <= 1.01 * most for low, high, most in axes)
