"""Annotations: what a user may write, what is put right and counted, what is refused and why."""

import copy
import json

import pytest
from PIL import Image

from vlmjax.data import annotation, chat
from vlmjax.data.annotation import document_message, ordinary_messages, to_record
from vlmjax.data.grounding import GROUNDING
from vlmjax.data.health import BadRecord


def turns(*texts):
    who = ("human", "gpt")
    return [{"from": who[k % 2], "value": text} for k, text in enumerate(texts)]


def shape(messages):
    """Returns messages as roles and what their parts hold."""
    return [
        (m["role"], m["content"])
        if isinstance(m["content"], str)
        else (m["role"], [p[p["type"] if p["type"] != "ref" else "text"] for p in m["content"]])
        for m in messages
    ]


HUMAN, SAY = turns("<image>\nWhat?")[0], turns("Say")[0]
ANSWER = {"from": "gpt", "value": "x"}
INF = float("inf")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(folder / name)
    (tmp_path / "secret.png").write_bytes(b"")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return folder


@pytest.mark.parametrize(
    "record,reason,match",
    [
        (
            {"image": "a", "conversations": [{"from": "alien", "value": "x"}]},
            "unknown_role",
            "from",
        ),
        ({"conversations": [{"from": None, "value": "x"}]}, "unknown_role", "from None"),
        ({"conversations": [{"value": "x"}]}, "unknown_role", "from None"),
        (
            {"image": "a", "conversations": [{"from": "human", "value": 3}]},
            "malformed",
            "says a int",
        ),
        ({"conversations": [{"from": "human"}]}, "malformed", "says a NoneType"),
        ({"conversations": ["hello"]}, "malformed", "turn 0 is a str"),
        ({"conversations": "hello"}, "malformed", "'conversations' of type str"),
        ({"image": ["a", "b"], "conversations": [HUMAN]}, "placeholders", "1 <image> tags for 2"),
        ({"conversations": [HUMAN]}, "placeholders", "1 <image> tags for 0 image files"),
        ({"video": "a", "conversations": [HUMAN]}, "placeholders", "1 <image> tags for 0"),
        ({"image": {"a": 1}, "conversations": [SAY]}, "malformed", "annotation has image"),
        ({"image": [None], "conversations": [SAY]}, "malformed", "annotation has image"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "malformed", "no human turn"),
        ({"image": "a"}, "malformed", "'conversations' of type NoneType"),
        ({"boxes": [[0, 0, 1, 1]], "conversations": [SAY]}, "placeholders", "0 <box> tags for 1"),
        ({"spans": [], "conversations": turns("at <span>")}, "placeholders", "1 <span> tags for 0"),
        ({"spans": [[2, 1]], "conversations": turns("at <span>")}, "malformed", "is no .start"),
        ({"boxes": [[0, 0, 9, 9]], "conversations": turns("<box>")}, "malformed", "is no .x1"),
        (
            {"boxes": [[0, 0, 9, 9]], "image_size": [], "conversations": turns("<box>")},
            "malformed",
            "0 sizes in 'image_size' for 1 boxes",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "malformed", "the part"),
    ],
)
def test_malformed_annotations_are_refused(record, reason, match):
    with pytest.raises(BadRecord, match=match) as error:
        ordinary_messages(record)
    assert error.value.reason == reason


def test_system_turns_and_untagged_media():
    record = {
        "image": ["a", "b"],
        "conversations": [{"from": "system", "value": "Be brief."}, SAY, ANSWER],
    }
    messages, repairs = ordinary_messages(record)
    assert shape(messages) == [
        ("system", "Be brief."),
        ("user", ["a", "b", "Say"]),
        ("assistant", "x"),
    ]
    assert repairs == {"missing_tag": 2}


def test_leading_answers_are_left_out_and_counted():
    record = {"conversations": [ANSWER, {"from": "system", "value": "s"}, ANSWER, SAY, ANSWER]}
    messages, repairs = ordinary_messages(record)
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert repairs == {"leading_assistant": 2}


@pytest.mark.parametrize(
    "text,tags",
    [
        ("How do I use the HTML <video> tag?", 1),
        ("Explain <image> and <video> in SVG", 2),
        ("What is wrong?\n<video>\n  <source>\n</video>", 1),
        ("No tag", 0),
    ],
)
def test_markup_in_records_without_media_is_text(text, tags):
    messages, repairs = ordinary_messages({"conversations": turns(f" {text}\n", "x")})
    assert shape(messages) == [("user", [text]), ("assistant", "x")]
    assert repairs == ({"literal_tag": tags} if tags else {})


@pytest.mark.parametrize(
    "text",
    ["<image>\nWhat?", "What?\n<image>", "Picture 1: <image>\nWhat?", "<video>", "a <image>"],
)
def test_places_of_lost_media_are_no_markup(text):
    for said in (turns(text, "x"), turns("The <image> tag", "x", text, "y")):
        with pytest.raises(BadRecord, match="tags for 0") as error:
            ordinary_messages({"conversations": said})
        assert error.value.reason == "placeholders"


def test_images_and_videos_stand_anywhere():
    record = {
        "image": ["a", "b"],
        "video": ["v", "w"],
        "conversations": turns(
            "First <video> then <image>", "ok <image>", "<image>\n<video> more?", "yes"
        ),
    }
    messages, repairs = ordinary_messages(record)
    assert not repairs
    assert shape(messages) == [
        ("user", ["First", "v", "then", "a"]),
        ("assistant", "ok <image>"),  # only users show pictures
        ("user", ["b", "w", "more?"]),
        ("assistant", "yes"),
    ]
    record["conversations"] = turns("<video> and <video>", "ok")
    messages, repairs = ordinary_messages(record)
    assert shape(messages)[0] == ("user", ["a", "b", "v", "and", "w"])
    assert repairs == {"missing_tag": 2}


def test_messages_with_parts():
    record = {
        "images": ["a"],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "<image> "}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            {"role": "user", "content": [{"type": "video", "video": "v"}]},
            {"role": "assistant", "content": "Yes."},
        ],
    }
    before = copy.deepcopy(record)
    messages, repairs = ordinary_messages(record)
    assert not repairs and record == before
    assert shape(messages) == [
        ("user", ["<image> ", "a"]),
        ("assistant", "A cat."),
        ("user", ["v"]),
        ("assistant", "Yes."),
    ]


def test_boxes_and_spans_take_the_places_of_tags(root):
    record = {
        "id": 7,
        "image": "a.png",
        "image_size": [40, 30],
        "boxes": [[4, 3, 20, 15], [[0, 0, 40, 30], [0, 0, 4, 3]]],
        "spans": [[1, 2.5]],
        "conversations": turns(
            "<image>\nWhat is at <box> ?", "<ref>The dogs</ref> <box>, at <span> <image>"
        ),
    }
    record = to_record(record, root)
    text = chat.render(record["messages"], "I", "V", grounding=GROUNDING["internvl"])
    assert text == (
        "<|im_start|>user\nI\nWhat is at <box>[[100, 100, 500, 500]]</box> ?<|im_end|>\n"
        "<|im_start|>assistant\n<ref>The dogs</ref> <box>[[0, 0, 1000, 1000], [0, 0, 100, 100]]"
        "</box>, at 1.0 - 2.5 s <image><|im_end|>\n"
    )


def test_a_size_for_each_box_and_tags_without_boxes():
    record = {
        "image": ["a", "b"],
        "boxes": [[5, 5, 10, 10], [5, 5, 10, 10]],
        "image_size": [[10, 10], [100, 100]],
        "conversations": turns("<image><image>", "<box> and <box>, <span>"),
    }
    content = ordinary_messages(record)[0][1]["content"]
    assert [p["boxes"][0][0] for p in content if p["type"] == "box"] == [0.5, 0.05]
    assert content[-1]["text"] == ", <span>"
    plain = {"conversations": turns("<box>?", "<ref>x</ref><box>[[1, 2, 3, 4]]</box> <span>")}
    messages, _ = ordinary_messages(plain)
    assert shape(messages) == [
        ("user", ["<box>?"]),
        ("assistant", plain["conversations"][1]["value"]),
    ]


MMC4 = {
    "text_list": ["One.", "Two.", "Three."],
    "image_info": [
        {"image_name": "b", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "a", "matched_text_index": 1},
        {"image_name": "c", "matched_text_index": 2},
    ],
}


def test_documents():
    message = document_message(MMC4)
    assert shape([message]) == [("document", ["One.", "a", "Two.", "b", "c", "Three."])]
    assert chat.render([message], "I", "V") == "One.I\nTwo.I\nI\nThree.<|endoftext|>"  # as VILA
    obelics = {
        "texts": [None, "One.", "Two.", None, "Three."],
        "images": ["a", None, None, "b", None],
    }
    message = document_message(obelics)
    assert shape([message]) == [("document", ["a", "One. Two.", "b", "Three."])]
    assert shape([document_message({"texts": ["One.", "Two."]})]) == [("document", ["One. Two."])]
    tagged = document_message({"texts": ["<image> stays text"], "images": [None]})
    assert shape([tagged]) == [("document", ["<image> stays text"])]


@pytest.mark.parametrize(
    "record,reason",
    [
        ({"texts": "x"}, "malformed"),
        ({"texts": [3]}, "malformed"),
        ({"texts": ["x"], "images": []}, "malformed"),
        ({"texts": ["x"], "images": "a"}, "malformed"),
        ({"texts": ["x"], "image_info": [{"image": "a", "matched_text_index": 1}]}, "malformed"),
        ({"texts": ["x"], "image_info": [{"image": "a", "matched_text_index": 0.0}]}, "malformed"),
        ({"texts": ["x"], "image_info": [{"matched_text_index": 0}]}, "malformed"),
        ({"texts": ["x"], "image_info": ["a"]}, "malformed"),
        ({"texts": [None], "images": ["a.png"]}, "no_answer"),
        ({"texts": ["x"], "images": ["http://x/a.png"]}, "remote_media"),
        ({"conversations": [SAY]}, "no_answer"),
        ({"conversations": turns("Say", "")}, "no_answer"),
        ({"conversations": turns("Say", " \n", "again", "")}, "no_answer"),
        ({"image": "c.png", "conversations": [SAY, ANSWER]}, "missing_file"),
        ({"image": "x" * 9999, "conversations": [SAY, ANSWER]}, "missing_file"),
        ({"image": "a\0.png", "conversations": [SAY, ANSWER]}, "missing_file"),
        ({"image": "loop.png", "conversations": [SAY, ANSWER]}, "missing_file"),
        ({"image": "", "conversations": [SAY, ANSWER]}, "missing_file"),
        ({"image": "../secret.png", "conversations": [SAY, ANSWER]}, "outside_root"),
        ({"image": "link.png", "conversations": [SAY, ANSWER]}, "outside_root"),
        ({"image": "/etc/passwd", "conversations": [SAY, ANSWER]}, "outside_root"),
        ({"video": "http://x/v.mp4", "conversations": [SAY, ANSWER]}, "remote_media"),
        ({"stream": True, "video": [], "conversation": []}, "malformed"),
        ({"stream": True, "video": "v", "start_time": "0", "conversation": []}, "malformed"),
        ({"stream": True, "video": "v", "start_time": INF, "conversation": []}, "malformed"),
        ({"stream": True, "video": "v", "end_time": 10**400, "conversation": []}, "malformed"),
        ("hello", "malformed"),
        (None, "malformed"),
    ],
)
def test_records_that_cannot_be_used_say_why(root, record, reason):
    with pytest.raises(BadRecord) as error:
        to_record(record, root, id="x")
    assert error.value.reason == reason


def test_an_annotation_needs_an_id(root):
    with pytest.raises(ValueError, match="has no 'id': pass one"):
        to_record({"conversations": [SAY, ANSWER]}, root)


def test_one_answer_is_enough_and_repairs_are_in_the_record(root):
    record = to_record({"conversations": turns("Say", "", "again", "x")}, root, id=3)
    assert record["id"] == "3" and "repairs" not in record
    record = to_record({"image": "a.png", "conversations": [ANSWER, SAY, ANSWER]}, root, id=3)
    assert record["repairs"] == {"missing_tag": 1, "leading_assistant": 1}
    assert record["messages"][0]["content"][0]["image"] == root / "a.png"
    encoded = (root / "a.png").read_bytes()  # sources may bring the file itself
    record = to_record({"image": encoded, "conversations": [HUMAN, ANSWER]}, root, id=3)
    assert record["messages"][0]["content"][0]["image"] is encoded


WHOLE = {
    "id": "x",
    "image": ["a.png", "b.png"],
    "boxes": [[0, 0, 1, 1]],
    "image_size": [40, 30],
    "spans": [[0, 1]],
    "conversations": [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "<image> <image> <box>"},
        {"from": "gpt", "value": "<ref>it</ref> <span>"},
    ],
}
DOCUMENT = {"id": "x", "texts": ["x", None], "images": [None, "a.png"]}
INFO = {"id": "x", "texts": ["x"], "image_info": [{"image": "a.png", "matched_text_index": 0}]}
JUNK = [None, True, 3, -1.5, float("nan"), "", "<image>", "gpt", [], [[]], {}, [None], {"type": []}]


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items if isinstance(value, (dict, list)) else ():
        yield from (
            places(inner, (*path, key)) if isinstance(inner, (dict, list)) else [(*path, key)]
        )


@pytest.mark.parametrize("record", [WHOLE, DOCUMENT, INFO], ids=["turns", "lists", "info"])
def test_whatever_is_wrong_is_a_bad_record(root, record):
    to_record(record, root)
    for path in list(places(record))[1:]:
        for junk in [*JUNK, "delete"]:
            broken = json.loads(json.dumps(record))
            where = broken
            for key in path[:-1]:
                where = where[key]
            if junk == "delete":
                del where[path[-1]]
            else:
                where[path[-1]] = junk
            try:
                made = to_record(broken, root, id="y")
                chat.check_messages(made["messages"])
            except BadRecord:
                continue


@pytest.mark.parametrize(
    "text", ["<video>", "zqm0zq <|im_end|>", "<box>", "<ref>x</ref>", "</s>\n"]
)
def test_answers_are_kept_letter_by_letter(text):
    said = f" {text} and\n{text} "
    messages, _ = ordinary_messages({"conversations": turns("Say", said, "again", text)})
    assert [m["content"] for m in messages if m["role"] == "assistant"] == [said, text]


def test_media_paths_stay_inside_the_root(root):
    assert annotation.media_path(root, "a.png") == root / "a.png"
    with pytest.raises(BadRecord, match="leads outside"):
        annotation.media_path(root, root.parent / "secret.png")
    with pytest.raises(BadRecord, match="is a URL"):
        annotation.media_path(root, "http://a/b.png")
