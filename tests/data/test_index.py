"""Length indices: equal to what is packed, resumed, made by workers, refused when stale."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from data_mixture import clip, picture, talk, write

from vlmjax.batch import Budget, Form, TowerForm
from vlmjax.data import index
from vlmjax.data.health import BadRecord
from vlmjax.data.jsonl import JsonSource
from vlmjax.data.loading import WorkerFailure
from vlmjax.data.mixture import Mixture
from vlmjax.data.pack import size
from vlmjax.data.plan import Plan
from vlmjax.data.processor import Processor, ProcessorConfig
from vlmjax.data.reader import PlannedRows, Reader
from vlmjax.data.tokenizer import byte_tokenizer

BUDGET = Budget(400, (400,), (400,), (4,))
SETTINGS = dict(patch=8, min_visual_tokens=1, max_visual_tokens=60)


def processor(**settings):
    return Processor(
        ProcessorConfig(**SETTINGS | settings), byte_tokenizer(), Form((TowerForm(8),))
    )


def source(folder, number=20):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(number):
        media = [{}, {"image": [picture(folder, f"{i}_{k}.png", rng) for k in range(2)]}]
        media.append({"video": clip(folder, f"{i}.mp4", rng)} if i % 6 == 2 else {})
        rows.append(talk(f"r{i}", f"What is {i}?", **media[i % 3]))
    rows[4] = talk("gone", "<image>?", image="gone.png")
    rows[9] = talk("long", "word " * 300)
    write(folder / "rows.jsonl", rows)
    return JsonSource(folder / "rows.jsonl", folder)


def same(a, b):
    np.testing.assert_array_equal(a.sizes, b.sizes)
    np.testing.assert_array_equal(a.reasons, b.reasons)
    assert a.digest == b.digest and list(a.bad()) == list(b.bad())


@pytest.mark.parametrize("pixels", index.PIXELS)
def test_lengths_are_those_of_the_samples(tmp_path, pixels):
    """Those of headers are of videos before they are pruned."""
    records, process = source(tmp_path), processor(threshold=0.5)
    found = index.build(records, process, BUDGET, tmp_path / "index", pixels=pixels)
    assert [(b["record"], b["id"], b["reason"]) for b in found.bad()] == [
        (4, records.id(4), "missing_file"),
        (9, records.id(9), "too_long"),
    ]
    assert sorted(found.usable) == sorted(set(range(20)) - {4, 9})
    pruned = 0
    for k in found.usable:
        sample = process(records[k])
        if pixels == "decoded" or all(item.keep.all() for item in sample.items):
            assert tuple(found.sizes[k]) == size(sample, BUDGET)
        else:
            assert (found.sizes[k] >= size(sample, BUDGET)).all()
            pruned += tuple(found.sizes[k]) != size(sample, BUDGET)
    assert (pruned > 0) == (pixels == "blank")
    again = index.open_index(tmp_path / "index", records, process, BUDGET)  # both kinds serve
    assert again.digest == found.digest


def test_workers_and_interruption_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(index.CHUNK, "blank", 4)
    records, process = source(tmp_path), processor()
    whole = index.build(records, process, BUDGET, tmp_path / "whole")
    same(index.build(records, process, BUDGET, tmp_path / "two", workers=2), whole)
    calls, measure = [], index.measure

    def killed(*work):
        calls.append(work[-1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*work)

    monkeypatch.setattr(index, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        index.build(records, process, BUDGET, tmp_path / "cut")
    with pytest.raises(ValueError, match="lacks 12 records still: make it with"):
        index.open_index(tmp_path / "cut", records, process, BUDGET)
    same(index.build(records, process, BUDGET, tmp_path / "cut"), whole)
    assert len(calls) == 3 + 3  # chunks of before are not measured again


def test_media_that_were_repaired_are_measured_again(tmp_path, monkeypatch):
    """`data index` once more: only records whose media were at fault, whose lines then go."""
    records, process, folder = source(tmp_path), processor(), tmp_path / "index"
    first, measured, measure = index.build(records, process, BUDGET, folder), [], index.measure
    written = (folder / "index.json").stat()

    def counted(*work):
        measured.extend(work[-1])
        return measure(*work)

    monkeypatch.setattr(index, "measure", counted)
    same(index.build(records, process, BUDGET, folder), first)
    assert measured == [4] and (folder / "index.json").stat() == written
    picture(tmp_path, "gone.png", np.random.default_rng(0), (40, 40))
    again = index.build(records, process, BUDGET, folder)
    assert measured == [4, 4] and again.digest != first.digest
    assert [b["record"] for b in again.bad()] == [9]
    np.testing.assert_array_equal(again.usable, np.delete(np.arange(20), 9))
    same(index.build(records, process, BUDGET, tmp_path / "new"), again)


def test_a_pass_that_was_killed_while_it_wrote(tmp_path, monkeypatch):
    records, process, folder = source(tmp_path), processor(), tmp_path / "index"
    whole = index.build(records, process, BUDGET, tmp_path / "whole")
    index.build(records, process, BUDGET, folder)
    identity = json.loads((folder / "index.json").read_text())["identity"]
    (folder / "index.json").write_text(json.dumps({"identity": identity}))
    with pytest.raises(ValueError, match="lacks 0 records still"):
        index.open_index(folder, records, process, BUDGET)
    reasons = np.load(folder / "reasons.npy")
    reasons[4:] = 255
    np.save(folder / "reasons.npy", reasons)
    listed = (folder / "bad.jsonl").read_bytes()
    (folder / "bad.jsonl").write_bytes(listed[:-30])
    same(index.build(records, process, BUDGET, folder), whole)
    (folder / "index.json").write_text("")
    with pytest.raises(ValueError, match="index.json is damaged .*: remove .* and make it with"):
        index.build(records, process, BUDGET, folder)


def test_lengths_serve_rows_of_any_size(tmp_path):
    """Record 9 has 1,500 tokens of text, the pictures take up to 120 patches."""
    records, process, folder = source(tmp_path), processor(), tmp_path / "index"
    found = index.build(records, process, BUDGET, folder)
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    large = dataclasses.replace(BUDGET, tokens=2000)
    small = dataclasses.replace(BUDGET, patches=(60,))
    for budget in (large, small):
        opened = index.open_index(folder, records, process, budget)
        same(index.build(records, process, budget, tmp_path / f"{budget.tokens}"), opened)
        assert opened.digest == found.digest
        usable = [k for k in range(20) if k != 4 and (found.sizes[k] <= budget.limits).all()]
        assert list(opened.usable) == usable
        assert len(usable) == 19 if budget is large else 9 < len(usable) < 18
        assert {b["record"] for b in opened.bad()} == set(range(20)) - set(usable)
    (over,) = [b for b in found.bad() if b["record"] == 9]
    assert "tokens (row budget 400): it fits no row" in over["message"]
    index.build(records, process, large, folder)
    changed = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert changed == written


class Fatal(JsonSource):
    """Its seventh record ends the process that reads it, as a decoder can."""

    def __getitem__(self, index):
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_record_that_kills_its_process_is_named(tmp_path):
    write(tmp_path / "rows.jsonl", [talk(f"r{i}", "?") for i in range(12)])
    work = (Fatal(tmp_path / "rows.jsonl", tmp_path), processor(), BUDGET, tmp_path / "index")
    with pytest.raises(
        WorkerFailure, match=r"was killed by SIGKILL .*before it made rows \[.*range\(7, 8\)"
    ):
        index.build(*work, workers=1, pixels="decoded")


def test_an_index_of_other_data_is_refused(tmp_path):
    records, process = source(tmp_path), processor()
    folder = tmp_path / "index"
    with pytest.raises(ValueError, match="there is no length index in .*data index"):
        index.open_index(folder, records, process, BUDGET)
    index.build(records, process, BUDGET, folder)
    other = processor(max_visual_tokens=30)
    for what, wanted in (
        ("processor", (records, other, BUDGET)),
        ("row", (records, process, Budget(400, (400, 400), (400,), (4,)))),
        ("pixels", (records, process, BUDGET, "decoded")),
    ):
        with pytest.raises(ValueError, match=f"made with another {what}: make it with"):
            index.open_index(folder, *wanted)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write(json.dumps(talk("more", "?")) + "\n")
    with pytest.raises(ValueError, match="made with another source, records"):
        index.build(JsonSource(tmp_path / "rows.jsonl", tmp_path), process, BUDGET, folder)


def test_a_record_that_has_grown_is_named_and_its_row_kept(tmp_path):
    """One of three pictures becomes larger than its index says, first by what the row can spare."""
    rng, process = np.random.default_rng(0), processor(max_visual_tokens=400)
    budget = Budget(400, (200,), (200,), (4,))
    rows = [
        talk(f"r{i}", "<image>?", image=picture(tmp_path, f"{i}.png", rng, (56, 56)))
        for i in range(3)
    ]
    write(tmp_path / "rows.jsonl", rows)
    records = JsonSource(tmp_path / "rows.jsonl", tmp_path)
    found = index.build(records, process, budget, tmp_path / "index")
    plan = Plan(Mixture([3], [1.0], 0), [found.sizes], [budget], 1, draws=3)
    packed = PlannedRows(
        plan, Reader(["r"], [records], [process]), [budget], process.form, "token", (0,)
    )
    assert len(plan) == 1 and len(packed[0].ids) == 3
    picture(tmp_path, "1.png", rng, (64, 64))
    assert set(packed[0].ids) == {"r0", "r1", "r2"}  # there was room to spare
    picture(tmp_path, "1.png", rng, (104, 96))
    (bad,) = packed[0].bad
    assert bad[:3] == ("r", records.id(1), "too_long") and "length index says" in bad.message
    assert set(packed[0].ids) == {"r0", "r2"}


def test_blank_samples_read_headers_only(tmp_path):
    """A picture whose pixels are cut off has a size, and fails when it is used."""
    rng = np.random.default_rng(0)
    picture(tmp_path, "a.jpg", rng, (64, 64))
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "rows.jsonl", [talk("a", "<image>?", image="a.jpg")])
    record, process = JsonSource(tmp_path / "rows.jsonl", tmp_path)[0], processor()
    assert process(record, pixels="blank").items[0].num_slots == 49
    with pytest.raises(BadRecord, match="damaged or truncated") as error:
        process(record)
    assert error.value.reason == "damaged_media"
