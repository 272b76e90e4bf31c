"""Every source gives the same records, can be pickled, shared by threads, and tells its content."""

import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import source_files as files

from vlmjax.data import convert
from vlmjax.data.health import BadRecord
from vlmjax.data.shards import AbsentFiles
from vlmjax.data.sources import open_source

WRITER = Path(__file__).with_name("tfds_writer.py")


@pytest.fixture(scope="session")
def media(tmp_path_factory, make_video):
    folder = tmp_path_factory.mktemp("sources") / "media"
    files.make_media(folder, make_video("source.mp4", [40 * k for k in range(60)]))
    return folder


@pytest.fixture(scope="session")
def specs(media):
    """Kind -> spec of a source of the five records."""
    pytest.importorskip("datasets")
    pytest.importorskip("tensorflow_datasets")
    os.environ["HF_DATASETS_CACHE"] = str(media.parent / "cache")
    there, rows = media.parent, files.annotations()
    (there / "tars").mkdir()
    found = {
        "json": files.write_json(there / "a.json", rows),
        "jsonl": files.write_jsonl(there / "a.jsonl", rows),
        "parquet": files.write_parquet(there / "a.parquet", media),
        "tar": files.write_tars(there / "tars", media),
        "array_record": f"array_record:{there}/a.array_record",
        "tfds": f"tfds:{there}/tfds/tiny/1.0.0",
    }
    source = open_source(found["json"], media, 0)
    assert convert.pack(source, there / "a.array_record") == (5, {})
    done = subprocess.run(
        [sys.executable, WRITER, there / "tfds", media], capture_output=True, text=True
    )
    assert done.returncode == 0 and "tensorflow loaded: False" in done.stdout, done.stderr[-2000:]
    return found


def plain(value):
    """Returns a record with media as bytes, whatever held them."""
    if isinstance(value, Path):
        return value.read_bytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


KINDS = ("json", "jsonl", "parquet", "tar", "array_record", "tfds")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_records(specs, media, kind, make_processor):
    source = open_source(specs[kind], media, 0)
    expected = open_source(specs["json"], media, 0)
    assert len(source) == 5
    found = [source[i] for i in range(5)]
    assert [r["id"] for r in found] == ["one", "two", "clip", "live", "words"]
    for i in range(5):
        assert plain(found[i]) == plain(expected[i])
    assert len({source.id(i) for i in range(5)}) == 5
    with pytest.raises(IndexError):
        source.id(5)
    process = make_processor(min_visual_tokens=1)
    for i in (0, 2, 3):
        ours, theirs = process(found[i]), process(expected[i])
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert all(
            (a.patches == b.patches).all() for a, b in zip(ours.items, theirs.items, strict=True)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_and_read_by_threads(specs, media, kind):
    source = open_source(specs[kind], media, 0)
    expected = [plain(source[i]) for i in range(5)]
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == 5 and again.fingerprint == source.fingerprint
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda i: plain(again[i % 5]), range(60)))
    assert found == expected * 12


def test_the_digest_tells_the_content(tmp_path, media):
    def digests(answer):
        rows = [{**row} for row in files.annotations()]
        rows[0]["conversations"] = files.turns("<image>", answer)
        found = [open_source(files.write_jsonl(tmp_path / "a.jsonl", rows), media, 0)]
        found.append(open_source(files.write_json(tmp_path / "a.json", rows), media, 0))
        convert.pack(found[0], tmp_path / "a.array_record")
        found.append(open_source(f"array_record:{tmp_path}/a.array_record", media, 0))
        return [s.fingerprint for s in found]

    first, other = digests("yes"), digests("noo")
    assert digests("yes") == first and not set(first) & set(other)


def test_digests_of_other_files(specs, media, tmp_path):
    shards = open_source(specs["tar"], media, 0)
    one = open_source(specs["tar"].replace("{000..001}", "000"), media, 0)
    assert (len(shards), len(one)) == (5, 3) and shards.fingerprint != one.fingerprint
    before = open_source(specs["parquet"], media, 0).fingerprint
    (media / "in/a.png").rename(tmp_path / "a.png")
    try:
        (media / "in/a.png").write_bytes(files.picture("green", "PNG", (41, 30)))
        changed = open_source(files.write_parquet(tmp_path / "a.parquet", media), media, 0)
    finally:
        (tmp_path / "a.png").replace(media / "in/a.png")
    assert changed.fingerprint != before


def test_a_parquet_file_that_changes_is_read_again(specs, media, tmp_path):
    import pyarrow
    import pyarrow.parquet

    for answer in ("yes", "no"):
        rows = [{"messages": [{"role": "user", "content": "?"}]}]
        rows[0]["messages"].append({"role": "assistant", "content": answer})
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / "[a].parquet")
        (record,) = [open_source(f"parquet:{tmp_path}/[a].parquet", media, 0)[0]]
        assert record["messages"][1]["content"] == answer
        assert record["id"].endswith("[a].parquet:0")


def test_parts_of_messages_in_tables(specs, media, tmp_path):
    import pyarrow
    import pyarrow.parquet

    red, blue = files.picture("red", "PNG"), files.picture("blue", "PNG")
    part = {"type": "image", "text": None}
    said = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    asked = [part, {"type": "text", "text": "and"}, part]
    rows = [{"images": [{"bytes": red}, {"bytes": blue}]}]
    rows[0]["messages"] = [{"role": "user", "content": asked}, said]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    record = open_source(f"parquet:{tmp_path}/a.parquet", media, 0)[0]
    content = record["messages"][0]["content"]
    assert [p["type"] for p in content] == ["image", "text", "image"]
    assert (content[0]["image"], content[2]["image"]) == (red, blue)


def test_media_inside_of_messages_in_tables(specs, media, tmp_path):
    import pyarrow
    import pyarrow.parquet

    red = files.picture("red", "PNG")
    parts = [
        {"type": "image", "image": {"bytes": red, "path": None}, "text": None},
        {"type": "text", "image": None, "text": "and"},
        {"type": "image", "image": {"bytes": None, "path": "in/b.jpg"}, "text": None},
    ]
    said = [{"type": "text", "image": None, "text": "a"}]
    rows = [{"messages": [_turn("user", parts), _turn("assistant", said)]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    content = open_source(f"parquet:{tmp_path}/a.parquet", media, 0)[0]["messages"][0]["content"]
    assert content[0]["image"] == red and content[2]["image"] == (media / "in/b.jpg").resolve()


def _turn(role, content):
    return {"role": role, "content": content}


def test_boxes_and_documents_survive_packing(media, tmp_path):
    ground = {"image": "in/a.png", "image_size": [40, 30], "boxes": [[1, 2, 30, 20]]}
    ground["conversations"] = files.turns("<image>", "at <box>")
    document = {"texts": ["x", None, "y"], "images": [None, "in/b.jpg", None]}
    source = open_source(files.write_jsonl(tmp_path / "a.jsonl", [ground, document]), media, 0)
    assert convert.pack(source, tmp_path / "a.array_record") == (2, {})
    packed = open_source(f"array_record:{tmp_path}/a.array_record", media, 0)
    for i in range(2):
        assert plain(packed[i]) == plain(source[i])


def test_few_of_many_files_are_open_at_a_time(media, tmp_path):
    from vlmjax.data.array_record import OPEN

    rows = [{"id": f"{k}", "conversations": files.turns("")} for k in range(2)]
    source = open_source(files.write_jsonl(tmp_path / "a.jsonl", rows), media, 0)
    for k in range(OPEN + 40):
        if k:
            shutil.copy(tmp_path / "0.array_record", tmp_path / f"{k}.array_record")
        else:
            convert.pack(source, tmp_path / "0.array_record")
    many = open_source(f"array_record:{tmp_path}/*.array_record", media, 0)
    assert len(many) == 2 * (OPEN + 40) and len(many[-1]["messages"]) == 2
    ids = [many[k]["id"] for k in range(len(many))]
    assert ids == ["0", "1"] * (OPEN + 40)
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert sum(str(tmp_path.resolve()) in file for file in opened) == OPEN


@pytest.mark.parametrize(
    "said,kind",
    [
        ("open() failed: Too many open files; opening a", OSError),
        ("pread() failed: Input/output error", OSError),
        ("open() failed: No such file or directory; opening a", BadRecord),
        ("Corrupted Riegeli/records file", BadRecord),
    ],
)
def test_a_failing_machine_is_not_a_bad_record(media, tmp_path, monkeypatch, said, kind):
    from vlmjax.data import array_record

    def failing(*file):
        raise RuntimeError(said)

    rows = [{"conversations": files.turns("")}]
    source = open_source(files.write_jsonl(tmp_path / "a.jsonl", rows), media, 0)
    convert.pack(source, tmp_path / "a.array_record")
    packed = open_source(f"array_record:{tmp_path}/a.array_record", media, 0)
    monkeypatch.setattr(array_record, "_reader", failing)
    with pytest.raises(kind, match=said.partition(";")[0].replace("(", ".").replace(")", ".")):
        packed[0]


def test_packing_leaves_out_what_json_cannot_hold(media, tmp_path):
    scored = {"type": "image", "image": "in/a.png", "score": float("nan")}
    rows = [
        {"id": "good", "conversations": files.turns("")},
        {"id": "half", "conversations": files.turns("\ud83d")},
        {"id": "nan", "messages": [_turn("user", [scored]), _turn("assistant", "a")]},
        {"id": "last", "conversations": files.turns("")},
    ]
    source = open_source(files.write_jsonl(tmp_path / "a.jsonl", rows), media, 0)
    assert convert.pack(source, tmp_path / "a.array_record") == (2, {"malformed": 2})
    listed = (tmp_path / "a.array_record.errors.jsonl").read_text()
    assert "record 'half' cannot be written" in listed and "record 'nan' cannot" in listed


def test_tfds_and_array_record_without_tensorflow(specs, media):
    code = f"""
import sys
from vlmjax.data.sources import open_source
for spec in {[specs["tfds"], specs["array_record"], specs["parquet"]]!r}:
    source = open_source(spec, {str(media)!r}, 0)
    assert [source[i]["id"] for i in range(5)][:2] == ["one", "two"]
print(sorted({{"tensorflow", "torch", "jax", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("[]")


def test_sources_load_nothing_they_do_not_use():
    code = """
import sys
import vlmjax.data.sources
print(sorted({"datasets", "pyarrow", "array_record", "tensorflow_datasets"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


@pytest.mark.parametrize(
    "spec,message",
    [
        ("jsn:a", "write KIND:NAME with KIND one of .*'array_record'"),
        ("json:", "write KIND:NAME"),
        ("json:none.json", "none.json is not a file"),
        ("tar:none-{0..2}.tar", "'none-0.tar' is no file and matches none"),
        ("tar:https://a/b.tar", "is a URL"),
        ("array_record:https://a/b", "is a URL"),
        ("tfds:gs://a/b", "is a URL"),
        ("tfds:nowhere", "TFDS folder 'nowhere' is not there"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec, ".", 0)


def test_a_source_that_is_there_in_part_is_not_absent(tmp_path):
    """It would be left out whole, and the others trained on, where absent sources are reported."""
    with tarfile.open(tmp_path / "a-0.tar", "w") as tar:
        files.add(tar, "k.json")
    with pytest.raises(
        ValueError, match="2 of the tar shards of .* are not there, 1 are"
    ) as caught:
        open_source(f"tar:{tmp_path}/a-{{0..2}}.tar", ".", 0)
    assert "a-1.tar" in str(caught.value) and not isinstance(caught.value, AbsentFiles)
    with pytest.raises(AbsentFiles, match="b-0.tar' is no file and matches none"):
        open_source(f"tar:{tmp_path}/b-{{0..2}}.tar", ".", 0)


@pytest.mark.parametrize("kind", ["parquet", "array_record", "tar"])
def test_files_of_another_kind(tmp_path, kind):
    (tmp_path / "a").write_bytes(b"something else" * 100)
    with pytest.raises(ValueError, match="a.*(cannot be read|are not whole|is not whole)"):
        open_source(f"{kind}:{tmp_path}/a", tmp_path, 0)


def test_bytes_of_records_are_checked(specs, media):
    from vlmjax.data import record_bytes

    source = open_source(specs["json"], media, 0)
    for i in range(5):
        data = record_bytes.encode(source[i])
        assert plain(record_bytes.decode(data)) == plain(source[i])
    data = record_bytes.encode(source[3])
    damaged = [data[:-1], data + b"x", data[:50], b"", b"\xff" * 40]
    damaged += [
        data.replace(b'"blob": 0', b'"blob": 7'),
    ]
    for wrong in damaged:
        with pytest.raises(BadRecord, match="no record of ours") as caught:
            record_bytes.decode(wrong)
        assert caught.value.reason == "malformed"
