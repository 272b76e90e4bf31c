"""Boxes and spans: the text of each system, pixels and fractions, the padded square."""

import numpy as np
import pytest

from vlmjax.data.grounding import GROUNDING, Grounding, box_part, squared
from vlmjax.data.health import BadRecord

SIZE = (640, 480)
DOG, CAT = [64, 120, 320, 480], [6.4, 4.8, 12.8, 9.6]
WRITTEN = {
    "videollama3": "<box>[100, 250, 500, 1000]</box>",
    "internvl": "<box>[[100, 250, 500, 1000]]</box>",
    "cogvlm": "[[100,250,500,999]]",
    "llava": "[0.10, 0.31, 0.50, 0.88]",
    "qwen2_vl": "<|box_start|>(100,250),(500,999)<|box_end|>",
}
TWO = {
    "videollama3": "<box>[100, 250, 500, 1000]</box><box>[10, 10, 20, 20]</box>",
    "internvl": "<box>[[100, 250, 500, 1000], [10, 10, 20, 20]]</box>",
    "cogvlm": "[[100,250,500,999;010,010,020,020]]",
    "llava": "[0.10, 0.31, 0.50, 0.88], [0.01, 0.13, 0.02, 0.14]",
    "qwen2_vl": "<|box_start|>(100,250),(500,999)<|box_end|>"
    "<|box_start|>(10,10),(20,20)<|box_end|>",
}


def text(name, part):
    return "".join(value for _, value in GROUNDING[name].pieces(part))


@pytest.mark.parametrize("name", GROUNDING)
def test_what_a_system_writes(name):
    assert text(name, box_part(DOG, SIZE)) == WRITTEN[name]
    assert text(name, box_part([DOG, CAT], SIZE)) == TWO[name]
    marked = {"internvl": "<ref>a dog</ref>"}
    marked["qwen2_vl"] = "<|object_ref_start|>a dog<|object_ref_end|>"
    assert text(name, {"type": "ref", "text": "a dog"}) == marked.get(name, "a dog")
    span = "1.0-2.0 s" if name == "videollama3" else "1.0 - 2.0 s"
    assert text(name, {"type": "span", "span": [1, 2.04]}) == span


@pytest.mark.parametrize("name", ["internvl", "qwen2_vl"])
def test_marks_are_control_tokens(name):
    style = GROUNDING[name]
    pieces = style.pieces(box_part([0.1, 0.2, 0.3, 0.4]))
    assert [v for k, v in pieces if k == "control"] == [c for c in style.controls if "box" in c]
    phrase = style.pieces({"type": "ref", "text": style.controls[0]})
    assert [kind for kind, _ in phrase] == ["control", "text", "control"]


def test_pixels_and_fractions_are_the_same():
    assert box_part(DOG, SIZE)["boxes"] == box_part([0.1, 0.25, 0.5, 1.0])["boxes"]
    over = box_part([-3, 0, 645, 482], SIZE)["boxes"]  # 1 % beyond the edge, as rounding leaves it
    assert over == [[0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (333, 100), (7, 7)])
def test_the_square_is_where_padding_puts_the_picture(size):
    width, height = size
    picture = np.zeros((height, width))
    box = x1, y1, x2, y2 = width // 4, height // 3, width // 4 + 2, height // 3 + 2
    picture[y1:y2, x1:x2] = 1
    side = max(size)
    square = np.zeros((side, side))  # LLaVA's expand2square
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    rows, columns = np.nonzero(square)
    expected = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / side
    np.testing.assert_allclose(squared(box_part(box, size)["boxes"][0], size), expected)


@pytest.mark.parametrize(
    "boxes,size,match",
    [
        ([0, 0, 3, 1], None, "give pixels with 'image_size'"),
        ([5, 0, 3, 1], SIZE, "is no"),
        ([0, 0, 700, 1], SIZE, "is no"),
        ([0, 0, 1], SIZE, "is no"),
        ([0, 0, "1", 1], SIZE, "is no"),
        ([0, 0, float("nan"), 1], SIZE, "is no"),
        ([0, 0, True, float("inf")], SIZE, "is no"),
        ([], SIZE, "are none"),
        (None, SIZE, "are none"),
        (DOG, 640, "image_size 640"),
        (DOG, [640], r"image_size \[640\]"),
        (DOG, [0, 0], r"image_size \[0, 0\]"),
    ],
)
def test_bad_boxes_are_refused(boxes, size, match):
    with pytest.raises(BadRecord, match=match) as error:
        box_part(boxes, size)
    assert error.value.reason == "malformed"


def test_a_square_needs_the_size():
    with pytest.raises(BadRecord, match="needs 'image_size'"):
        text("llava", box_part([0.1, 0.2, 0.3, 0.4]))
    with pytest.raises(ValueError, match="frame is 'circle': use one of"):
        Grounding(frame="circle")
