"""The ledger of unusable records: each once, also over restarts, and an end above the quota."""

import json
import math
import pickle

import pytest

from vlmjax.data.health import BadRecord, Ledger, TooManyBadRecords

SIZES = {"coco": 3000, "text": 10, "demo": math.inf}


def lines(folder, name="data_errors.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_records_are_listed_and_counted_once(tmp_path):
    ledger = Ledger(tmp_path, SIZES)
    assert ledger.metrics() == {}
    ledger.record("coco", "a:1", "missing_file", "image 'ä\n.jpg' is not a file")
    ledger.record("coco", "a:1", "missing_file", "again")
    ledger.record("coco", "a:2", "too_long", "it is long")
    ledger.record("text", "a:1", "no_answer", "nothing to train")
    assert lines(tmp_path) == [
        {
            "source": "coco",
            "id": "a:1",
            "reason": "missing_file",
            "message": "image 'ä\n.jpg' is not a file",
        },
        {"source": "coco", "id": "a:2", "reason": "too_long", "message": "it is long"},
        {"source": "text", "id": "a:1", "reason": "no_answer", "message": "nothing to train"},
    ]
    expected = {"bad/coco/missing_file": 1, "bad/coco/too_long": 1, "bad/text/no_answer": 1}
    assert ledger.metrics() == expected
    resumed = Ledger(tmp_path, SIZES)
    assert resumed.metrics() == expected
    resumed.record("coco", "a:2", "too_long", "it is long")
    assert len(lines(tmp_path)) == 3


def test_a_source_over_its_quota_ends_the_run(tmp_path):
    ledger = Ledger(tmp_path, SIZES)  # 3 of 3000, 1 of 10
    ledger.record("text", "t", "malformed", "no key")
    for k in range(3):
        ledger.record("coco", f"a:{k}", "missing_file", "gone")
        ledger.record("demo", f"d:{k}", "missing_file", "gone")
    ledger.check()
    ledger.record("coco", "a:3", "damaged_media", "half")
    with pytest.raises(TooManyBadRecords) as caught:
        ledger.check()
    assert str(caught.value) == (
        "4 of the 3000 records of source 'coco' cannot be used (1 damaged_media, 3 missing_file), "
        "the quota is 0.001 of them or 1: the first are 'a:0', 'a:1', 'a:2', 'a:3', all with their "
        f"messages are in {tmp_path}/data_errors.jsonl. Repair or remove them, or raise data.quota"
    )
    Ledger(tmp_path, SIZES, quota=0.01).check()


def test_a_line_that_a_crash_cut_off_is_written_again(tmp_path):
    ledger = Ledger(tmp_path, SIZES)
    ledger.record("coco", "a", "too_long", "long")
    ledger.record("coco", "b", "too_long", "long")
    whole = ledger.file.read_bytes()
    ledger.file.write_bytes(whole[:-5])
    resumed = Ledger(tmp_path, SIZES)
    assert resumed.metrics() == {"bad/coco/too_long": 1}
    resumed.record("coco", "b", "too_long", "long")
    assert resumed.file.read_bytes() == whole


def test_each_host_writes_its_own_file_and_reads_all(tmp_path):
    hosts = [Ledger(tmp_path, SIZES, process=k) for k in range(2)]
    for host, name in zip(hosts, "ab", strict=True):
        host.record("coco", name, "too_long", "long")
    assert [len(lines(tmp_path, f"data_errors{k}.jsonl")) for k in ("", ".1")] == [1, 1]
    alone = Ledger(tmp_path, SIZES)
    alone.record("coco", "b", "too_long", "long")
    assert alone.metrics() == {"bad/coco/too_long": 2} and len(lines(tmp_path)) == 1


def test_the_quota_is_a_share(tmp_path):
    with pytest.raises(ValueError, match="quota of bad records is 5.*from 0 to 1"):
        Ledger(tmp_path, SIZES, quota=5)


def test_a_bad_record_survives_a_pickle():
    error = pickle.loads(pickle.dumps(BadRecord("too_long", "it is long")))
    assert (error.reason, str(error)) == ("too_long", "it is long")
