"""The demo's data: splits, determinism, answers that follow from the pictures, licences, tokens."""

import hashlib
import re
import string
import subprocess
import sys

import numpy as np
import pytest

from vlmjax.data.demo import TASKS, TOKENIZER, DemoSource, as_text
from vlmjax.data.demo.art import ASSETS
from vlmjax.data.demo.classes import HELD_STYLES, NAMES, trained_styles
from vlmjax.data.tokenizer import Tokenizer
from vlmjax.evals.scores import chance, score, standard_error

TWO_SPLITS = [name for name, task in TASKS.items() if "train" in task.splits]
SCORED = [name for name in TASKS if name != "text"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


def media(record):
    """Returns the pictures u8[h, w, 3] of a record and their words."""
    found = []
    for message in record["messages"]:
        for part in message["content"] if not isinstance(message["content"], str) else ():
            if part["type"] == "image":
                found.append((part["image"], part["alt"]))
            elif part["type"] == "video":
                found += zip(part["video"], part["alt"], strict=True)
    return found


def fingerprint(record):
    pixels = b"".join(picture.tobytes() for picture, _ in media(record))
    words = repr(as_text(record, filler=2)["messages"])
    return hashlib.sha256(pixels + words.encode()).hexdigest()


@pytest.mark.parametrize("task", TWO_SPLITS)
def test_splits_share_no_content(task):
    contents = {}
    for split in ("train", "test"):
        source = DemoSource(task, split)
        contents[split] = {atom for i in range(400) for atom in source[i]["content"]}
    assert not contents["train"] & contents["test"]


def test_training_never_shows_a_held_style():
    assert all(held not in trained_styles(name) for name, held in HELD_STYLES.items())
    assert all(trained_styles(name) for name in NAMES)
    with pytest.raises(ValueError, match="has no split 'train'"):
        DemoSource("name_cross", "train")


def test_records_are_the_same_in_another_process():
    code = (
        "from test_demo import *;"
        "print(*(fingerprint(DemoSource(t, 'test', 3)[i]) for t in TASKS for i in range(5)))"
    )
    here = [fingerprint(DemoSource(t, "test", 3)[i]) for t in TASKS for i in range(5)]
    folders = [str(ASSETS.parents[3]), str(ASSETS.parents[3] / "tests/data")]
    code = f"import sys; sys.path[:0] = {folders!r}; {code}"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.split() == here
    assert fingerprint(DemoSource("ocr", "test", 4)[0]) not in here


def answer_from_words(task, text):
    """Solves a record from its picture's words and its question alone."""
    words, _, question = text.rpartition("\n")
    subject = question.rstrip(".?").split()[-1]
    if task in ("name", "name_cross"):
        return words
    if task in ("digit", "digits", "letter", "ocr"):
        return words.replace(" ", "")
    if task == "caption":
        *things, ground = words.split()
        return " and ".join(things) + f" on {ground}"
    if task == "count":
        things = words.split()
        if question != "count all.":
            return str(things.count(subject))
        return ", ".join(f"{thing} {things.count(thing)}" for thing in dict.fromkeys(things))
    if task == "where":
        cells = re.findall(rf"([a-z ]+?) ({'|'.join(NAMES)})(?: |$)", words)
        if question.startswith("where is"):
            return dict(map(reversed, cells))[subject]
        return ", ".join(f"{place} {thing}" for place, thing in cells)
    if task == "chart":
        bars = dict(re.findall(r"(\w+) (\d)", words))
        if question.startswith("which"):
            return max(bars, key=lambda color: int(bars[color]))
        if question.startswith("how"):
            return bars[question.split()[-2]]
        return ", ".join(f"{color} {value}" for color, value in bars.items())
    if task == "multi_image":
        images = dict(re.findall(r"image (\d):(\w+)", words))
        if question.startswith("which"):
            return next(number for number, thing in images.items() if thing == subject)
        return "; ".join(f"image {number}: {thing}" for number, thing in images.items())
    frames = dict(re.findall(r"Time (\d+\.\ds):(\w+)", words))
    if question.startswith("what"):
        return frames[subject]
    if question.startswith("when"):
        return next(time for time, thing in frames.items() if thing == subject)
    return " ".join(f"{time} {thing}" for time, thing in frames.items())


@pytest.mark.parametrize("task", [t for t in SCORED if t != "stream"])
def test_answer_follows_from_the_words_of_the_picture(task):
    source = DemoSource(task, "test", 1)
    for i in range(100):
        record = as_text(source[i])
        assert answer_from_words(task, record["messages"][0]["content"]) == record["answer"]


def test_stream_speaks_once_when_the_thing_appears():
    source = DemoSource("stream", "test")
    silent = 0
    for i in range(100):
        record = source[i]
        question, *rest = record["messages"]
        target = question["content"].removeprefix("say when you see the ").removesuffix(".")
        frames = [m["content"][0] for m in rest if m["role"] == "stream"]
        first = next((f["time"] for f in frames if f["alt"] == target), None)
        assert record["answer"] == ("" if first is None else f"{first:.1f}s {target}")
        spoken = [k for k, m in enumerate(rest) if m["role"] == "assistant"]
        assert spoken == ([] if first is None else [int(first) + 1])
        assert [f["time"] for f in frames] == list(range(len(frames)))
        silent += first is None
    assert 0 < silent < 40


@pytest.mark.parametrize("task", [t for t in TASKS if t != "text"])
def test_pictures_are_small_and_fit_the_merge_window(task):
    source = DemoSource(task, "test")
    patches = []
    for i in range(50):
        pictures = [picture for picture, _ in media(source[i])]
        assert all(p.dtype == np.uint8 and p.shape[2] == 3 for p in pictures)
        assert all(p.shape[0] % 16 == p.shape[1] % 16 == 0 for p in pictures)
        patches.append(sum(p.shape[0] * p.shape[1] // 64 for p in pictures))
    assert max(patches) <= 80
    assert np.mean(patches) <= (65 if task in ("video", "stream") else 45)


def test_digits_are_written_by_other_people_in_the_test_split():
    glyphs = {
        split: {
            int(a.split()[1]) for i in range(500) for a in DemoSource("digits", split)[i]["content"]
        }
        for split in ("train", "test")
    }
    assert np.median(list(glyphs["test"])) > 1500 > np.median(list(glyphs["train"]))


def test_static_frames_repeat_their_pixels():
    source, still = DemoSource("video", "train"), 0
    for i in range(50):
        frames = [picture for picture, _ in media(source[i])]
        still += sum(np.array_equal(a, b) for a, b in zip(frames, frames[1:], strict=False))
    assert still > 10


def test_words_replace_pictures():
    record = DemoSource("video_as_text", "train")[0]
    twin = as_text(DemoSource("video", "train")[0], filler=2)
    assert record["messages"] == twin["messages"]
    assert re.match(r"Time 0\.0s:(~ )*\w+( ~)*,Time", record["messages"][0]["content"])
    assert record["answer"] == DemoSource("video", "train")[0]["answer"]


def test_unknown_task_says_which_there_are():
    with pytest.raises(ValueError, match="'colour' is unknown, the tasks are .*'ocr'"):
        DemoSource("colour")


def test_every_asset_is_attributed_and_small():
    text = (ASSETS / "ATTRIBUTION.md").read_text()
    files = [f for f in ASSETS.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    notices = {"ATTRIBUTION.md", "openmoji/NOTICE", "noto/LICENSE", "fonts/LICENSE"}
    names = {f.relative_to(ASSETS).as_posix() for f in files}
    assert notices <= names
    assert {n for n in names - notices if f"`{n}`" not in text} == set()
    assert {n for n in re.findall(r"^\| `(.+?)` \|", text, re.M) if n not in names} == set()
    assert sum(f.stat().st_size for f in files) < 1.5e6


def test_tokenizer_round_trip(tokenizer):
    texts = ["naïve € 東京 \U0001f431\n\ttabs  and   spaces", "Time 0.0s:cat,Time 1.0s:dog"]
    for task in TASKS:
        source = DemoSource(task, "test")
        for i in range(20):
            record = as_text(source[i])
            texts += [m["content"] for m in record["messages"]]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_tokens_are_words_letters_and_digits(tokenizer):
    for word in [*NAMES, *(f" {name}" for name in NAMES), "user", "assistant", "stream", "Time"]:
        assert len(tokenizer.encode_text(word)) == 1, word
    for text in (string.ascii_uppercase, string.digits):
        assert len(tokenizer.encode_text(text)) == len(text)
    assert 600 <= tokenizer.size <= 1000
    assert tokenizer.hf.eos_token == "<|im_end|>"


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_score_one_and_blind_ones_little(task):
    source = DemoSource(task, "test", 2)
    answers = [source[i]["answer"] for i in range(200)]
    assert all(score(task, f" {a}\n", a) == 1 for a in answers)
    assert 0 < chance(task, answers) <= (0.4 if task in ("stream", "name_cross") else 0.3)


@pytest.mark.parametrize(
    ("task", "prediction", "answer", "expected"),
    [
        ("video", "0.0s cat 1.0s pig", "0.0s cat 1.0s dog", 0.5),
        ("video", "0.0s cat", "0.0s cat 1.0s dog", 0.5),
        ("video", "0.5s cat 1.0s dog", "0.0s cat 1.0s dog", 0.5),
        ("video", "0.0s cat 1.0s dog 2.0s pig 3.0s pig", "0.0s cat 1.0s dog", 0.5),
        ("video", "1.0s", "2.0s", 0),
        ("count", "dog 2, cat 2", "dog 2, cat 1", 0.5),
        ("count", "cat 1, dog 2", "dog 2, cat 1", 1),
        ("count", "3", "dog 2, cat 1", 0),
        ("where", "top left cat, top dog", "top left cat, center dog", 0.5),
        ("where", "top", "top left", 0),
        ("where", "", "top left", 0),
        ("multi_image", "image 1: cat; image 2: cat", "image 1: cat; image 2: dog", 0.5),
        ("chart", "red 4, blue 7, green 1, pink 2", "red 4, blue 7, green 2", 0.5),
        ("caption", "cat on red", "dog on red", 0.5),
        ("caption", "cat and pig on red", "cat on blue", 1 / 3),
        ("stream", "", "", 1),
        ("stream", "1.0s cat", "", 0),
        ("stream", "", "1.0s cat", 0),
        ("stream", "1.0s cat 2.0s cat", "1.0s cat", 0.5),
        ("stream", "hello", "", 0),
        ("name", "Cat", "cat", 0),
        ("ocr", "BRAZIL", "BRAZIL", 1),
    ],
)
def test_score(task, prediction, answer, expected):
    assert score(task, prediction, answer) == pytest.approx(expected)


def test_chance_is_the_best_constant_of_each_form():
    assert chance("name", ["cat", "cat", "dog", "pig"]) == 0.5
    assert chance("count", ["cat 1", "dog 2", "2", "2"]) == 0.75
    assert chance("stream", ["0.0s cat", "0.0s dog", "1.0s pig", ""]) == 0.5
    assert chance("video", ["0.0s cat 1.0s dog", "0.0s cat 2.0s pig"]) == 0.75
    assert standard_error([1.0, 0.0] * 50) == pytest.approx(0.05, rel=0.02)
    assert standard_error([1.0] * 100) > 0
