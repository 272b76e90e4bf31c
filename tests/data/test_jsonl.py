"""Annotations by offset: any JSON is cut where it must be, and two million lines are cheap."""

import json
import pickle
import random
import subprocess
import sys

import pytest

from vlmjax.data import jsonl
from vlmjax.data.health import BadRecord
from vlmjax.data.jsonl import JsonSource

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PIECES = [
    "\\",
    '"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\n",
    " ",
    "x",
    "ü",
    "\\\\",
    '\\"',
    "\ud83d\ude00",
]


def drawn(rng, count):
    """Returns rows whose text is made of what a bad scanner trips over."""
    rows = []
    for number in range(count):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(40)))
        text = text.encode("utf-16", "surrogatepass").decode("utf-16")
        rows.append({"id": number, text: [{"a": [text, {}]}, [[]]], "conversations": TURNS})
    return rows


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("style", ["lines", "list", "indented"])
def test_whatever_is_in_strings(tmp_path, monkeypatch, piece, style):
    monkeypatch.setattr(jsonl, "_PIECE", piece)
    rng = random.Random(piece)
    rows = drawn(rng, 12 if piece < 64 else 200)
    ascii_only = bool(piece % 2)
    if style == "lines":
        text = "\r\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in rows)
        text = " \n\n" + text + rng.choice(["", "\n", "\n \t\n"])
    else:
        indent = 2 if style == "indented" else None
        text = (
            " \n"
            + json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
            + rng.choice(["", "\n"])
        )
    file = tmp_path / "a.json"
    file.write_bytes((b"\xef\xbb\xbf" if piece == 7 else b"") + text.encode())
    source = JsonSource(file, tmp_path)
    assert [source._row(i) for i in range(len(source))] == rows
    assert len(pickle.dumps(source)) < 8 * len(rows) + 1000  # eight bytes for each, as is said


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "holds no annotations"),
        ("\n \n", "holds no annotations"),
        ("[]", "holds no annotations"),
        (" [ \n ] ", "holds no annotations"),
        ('[{"a": 1}, {"a"', "without an end: it is truncated"),
        ('[{"a": "]}', "without an end: it is truncated"),
        ('[{"a": 1}] [{"a": 2}]', "text behind the list"),
        ('[{"a": 1}]\n{"a": 2}', "text behind the list"),
        ("<html>", "neither a JSON list nor one JSON object a line"),
        ('{\n"a": 1\n}', "neither a JSON list nor one JSON object a line"),
        ("[1, 2]", "neither a JSON list nor one JSON object a line.*is a int"),
    ],
)
def test_files_that_are_no_annotations(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        JsonSource(tmp_path / "a.json", tmp_path)
    assert not isinstance(caught.value, BadRecord)


@pytest.mark.parametrize(
    "line", ["{", "3", "[" * 100_000, '{"a": "\udcff"}', '{"image": 3, "conversations": 4}']
)
def test_a_bad_line_is_a_bad_record(tmp_path, line):
    good = json.dumps({"conversations": TURNS})
    lines = f"{good}\n{line}\n{good}\n".encode("utf-8", "surrogateescape")
    (tmp_path / "a.jsonl").write_bytes(lines)
    source = JsonSource(tmp_path / "a.jsonl", tmp_path)
    assert len(source) == 3
    assert source[2]["id"] == source.id(2) == f"{tmp_path}/a.jsonl:2"
    with pytest.raises(BadRecord, match="a.jsonl:1") as caught:
        source[1]
    assert caught.value.reason == "malformed"


@pytest.mark.slow
@pytest.mark.parametrize("style", ["lines", "list"])
def test_two_million_annotations(tmp_path, style):
    """Under 60 s and 500 MB; the file is about 0.7 GB."""
    file, number = tmp_path / "a.json", 2_000_000
    text = "<image>\\nWhat is in the picture, please? " * 3
    row = f'"conversations": [{{"from": "human", "value": "{text}"}}, '
    row += '{"from": "gpt", "value": "A \\"thing\\" {in} [brackets] with a tail, and more of it."}]'
    begin, between, end = {"lines": ("", "\n", "\n"), "list": ("[\n", ",\n", "\n]\n")}[style]
    with open(file, "w") as out:
        out.write(begin)
        for k in range(number):
            out.write(f'{between if k else ""}{{"id": "{k}", "image": "folder/{k}.jpg", {row}}}')
        out.write(end)
    code = f"""
import re, time
began = time.monotonic()
from vlmjax.data.sources import open_source
source = open_source("json:{file}", ".", 0)
seconds = time.monotonic() - began
assert len(source) == {number} and source._row(1_234_567)["id"] == "1234567"
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(seconds, int(peak[1]) / 1024)  # getrusage counts what the process was forked from, too
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, megabytes = map(float, done.stdout.split())
    assert file.stat().st_size > 5e8 and seconds < 60 and megabytes < 500, (seconds, megabytes)
