"""What `data inspect` says of sources and draws of them, and the commands themselves."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import source_files as files
from PIL import Image

from vlmjax.data import cli, contact_sheet, inspection
from vlmjax.data.sources import open_source

ROOT = Path(__file__).parents[2]


@pytest.fixture
def found(tmp_path, make_video, make_processor):
    """(survey, processor) of seven records, of which one has no file and one a damaged one."""
    files.make_media(tmp_path / "media", make_video("inspect.mp4", [40 * k for k in range(90)]))
    (tmp_path / "media/bad.png").write_bytes(files.picture("red", "PNG")[:-40])
    rows = files.annotations()
    for name in ("none.png", "bad.png"):
        rows.append({"id": name, "image": name, "conversations": files.turns("<image>")})
    spec = files.write_jsonl(tmp_path / "a.jsonl", rows)
    process = make_processor(min_visual_tokens=1)
    source = open_source(spec, tmp_path / "media", 0)
    return inspection.survey(spec, source, process, 100), process


def test_a_survey_counts(found):
    survey, _ = found
    assert survey.length == 7
    assert [s.name for s in survey.seen] == ["one", "two", "clip", "live", "words"]
    kinds = [s.modality for s in survey.seen]
    assert kinds == ["image", "several images", "video", "stream", "text"]
    assert [(name.rpartition(":")[2], reason) for name, reason, _ in survey.bad] == [
        ("5", "missing_file"),
        ("6", "damaged_media"),
    ]
    sizes = survey.seen[0].sizes
    assert sizes["patches"] == sizes["visual"] == 2 * 3
    assert survey.seen[4].sizes["trained"] == 601
    text = inspection.report([survey])
    assert "7 records, 7 looked at" in text and "1 image, 1 several images, 1 video" in text
    assert "missing_file" in text and "tokens a record" in text
    bars = [line for line in text.split("patches a record")[1].splitlines() if "to" in line]
    assert sum(int(line.split()[-1]) for line in bars) == 5


def test_a_histogram_has_every_value_once():
    for values in ([3], [0, 1], list(range(10)), list(range(11)), [5, 10_000, 10_000]):
        lines = inspection._histogram(np.array(values))
        assert sum(int(line.split()[-1]) for line in lines) == len(values)


def test_the_sheet_marks_what_is_trained_and_dims_what_is_pruned(found):
    survey, process = found
    page = np.asarray(contact_sheet.draw([survey], process.tokenizer))
    colors = {tuple(c) for c in page.reshape(-1, 3)}
    for _, paper in (contact_sheet._TRAINED, contact_sheet._VISUAL):
        assert tuple(int(paper[k : k + 2], 16) for k in (1, 3, 5)) in colors
    assert (255, 0, 0) in colors  # the red picture
    by_kind = {s.modality: s for s in survey.seen}
    runs = list(contact_sheet._runs(by_kind["image"].sample, process.tokenizer))
    trained = [text for text, *c in runs if c == list(contact_sheet._TRAINED)]
    assert trained == [files.ANSWER + "<|im_end|>"]
    assert [text for text, *c in runs if c == list(contact_sheet._VISUAL)] == ["[6 visual]"]
    assert by_kind["video"].pruned > 0


def test_long_chats_are_cut_in_the_middle_and_no_word_is_lost():
    runs = [("word " * 400 + "\n" + "x" * 500, "black", "white"), ("end", "green", "white")]
    lines = contact_sheet._lines(runs, 300)
    assert len(lines) == contact_sheet._HEAD + contact_sheet._TAIL + 1
    assert "lines" in lines[contact_sheet._HEAD][0][0] and lines[-1][-1][0] == "end"
    few = contact_sheet._lines([("a b  c\n\nd", "black", "white")], 300)
    assert ["".join(text for text, *_ in line) for line in few] == ["a b  c", "", "d"]


def test_large_and_elongated_views_fit():
    for shape in ((2000, 3000, 3), (10, 2000, 3), (3000, 4, 3), (8, 8, 3)):
        image = contact_sheet._fit(np.zeros(shape, np.uint8), 600, 150)
        assert image.width <= 600 and image.height <= 150


@pytest.mark.slow
def test_commands(tmp_path, make_video):
    files.make_media(tmp_path / "media", make_video("inspect.mp4", [40 * k for k in range(90)]))
    rows = [r for r in files.annotations() if r["id"] in ("one", "two")]
    rows.append({"id": "gone", "image": "none.png", "conversations": files.turns("<image>")})
    spec = files.write_json(tmp_path / "a.json", rows)
    output = tmp_path / "out" / "a.array_record"

    def run(*args):
        command = [sys.executable, "-m", "vlmjax.main", "data", *map(str, args)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)

    root = f"--media_root={tmp_path}/media"
    done = run("pack", f"--source={spec}", root, f"--output={output}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("2 records in") and "1 left out (1 missing_file)" in done.stdout
    done = run(
        "inspect",
        "--config=configs/demo.py:stage=4",
        f"--source=array_record:{output}",
        "--samples=8",
        f"--output={tmp_path}/out",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 records, 2 looked at" in done.stdout and "1 image, 1 several images" in done.stdout
    with Image.open(tmp_path / "out/contact_sheet.png") as page:
        assert page.width == 1280
    assert "data needs" not in done.stderr
    done = run("pack", f"--source={spec}")
    assert done.returncode != 0 and "data pack needs --output" in done.stderr + done.stdout


def test_what_cannot_be_packed(tmp_path):
    with pytest.raises(ValueError, match="must end with .array_record"):
        cli.pack("demo:ocr", None, str(tmp_path / "a.tar"))
    with pytest.raises(ValueError, match="without end"):
        cli.pack("demo:ocr", None, str(tmp_path / "a.array_record"))
