"""What a manifest may name: files inside the media root, once links are followed, and no URLs."""

import json
import os

import pytest
import source_files as files

from vlmjax.data import convert, record_bytes
from vlmjax.data.health import BadRecord
from vlmjax.data.sources import open_source


@pytest.fixture
def places(tmp_path):
    """A media root with a good picture and ways out of it."""
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "root2").mkdir()
    for folder in (root / "in", tmp_path, tmp_path / "root2"):
        (folder / "a.png").write_bytes(files.picture("red", "PNG"))
    (root / "link.png").symlink_to(tmp_path / "a.png")
    (root / "inner.png").symlink_to(root / "in/a.png")
    (root / "out").symlink_to(tmp_path, target_is_directory=True)
    (root / "chain.png").symlink_to(root / "link.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "empty.png").write_bytes(b"")
    (root / "in/broken.png").symlink_to(root / "in/none.png")
    os.mkfifo(root / "pipe.png")
    return root


NAMES = {
    "../a.png": "outside_root",
    "in/../../a.png": "outside_root",
    "../root2/a.png": "outside_root",
    "link.png": "outside_root",
    "chain.png": "outside_root",
    "out/a.png": "outside_root",
    "/etc/hostname": "outside_root",
    "https://example.com/a.png": "remote_media",
    "file:///etc/hostname": "remote_media",
    "in/none.png": "missing_file",
    "in/broken.png": "missing_file",
    "in": "missing_file",
    "pipe.png": "missing_file",
    "empty.png": "missing_file",
}


@pytest.mark.parametrize("kind", ["image", "video"])
def test_names_that_lead_out(places, tmp_path, kind):
    names = [*NAMES, "loop.png", "a\0b.png"]
    rows = [{"id": n, kind: [n], "conversations": files.turns(f"<{kind}>")} for n in names]
    source = open_source(files.write_jsonl(tmp_path / "a.jsonl", rows), places, 0)
    for index, name in enumerate(names):
        with pytest.raises(BadRecord) as caught:
            record_bytes.encode(source[index])
        assert caught.value.reason == NAMES.get(name, "missing_file"), name


def test_links_inside_are_fine(places, tmp_path):
    rows = [
        {"image": n, "conversations": files.turns("<image>")} for n in ("in/a.png", "inner.png")
    ]
    source = open_source(files.write_jsonl(tmp_path / "a.jsonl", rows), places, 0)
    for index in range(2):
        (part, _) = source[index]["messages"][0]["content"]
        assert part["image"] == places.resolve() / "in/a.png"


def test_tables_are_confined_as_well(places, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"image": {"bytes": None, "path": name}, "conversations": files.turns("<image>")}
        for name in ("link.png", "../a.png", "in/a.png")
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}/a.parquet", places, 0)
    for index in range(2):
        with pytest.raises(BadRecord) as caught:
            source[index]
        assert caught.value.reason == "outside_root"
    assert source[2]["messages"]


def test_packing_leaves_out_what_leads_out_and_says_so(places, tmp_path):
    names = ["in/a.png", *NAMES]
    rows = [{"id": n, "image": n, "conversations": files.turns("<image>")} for n in names]
    source = open_source(files.write_jsonl(tmp_path / "a.jsonl", rows), places, 0)
    output = tmp_path / "a.array_record"
    written, bad = convert.pack(source, output)
    assert written == 1 and bad == {
        reason: sum(r == reason for r in NAMES.values()) for reason in set(NAMES.values())
    }
    errors = tmp_path / "a.array_record.errors.jsonl"
    listed = [json.loads(s) for s in errors.read_text().splitlines()]
    assert [e["id"] for e in listed] == [source.id(i) for i in range(1, len(names))]
    assert [e["reason"] for e in listed] == list(NAMES.values())
    packed = open_source(f"array_record:{output}", tmp_path / "elsewhere", 0)
    assert [packed[i]["id"] for i in range(len(packed))] == ["in/a.png"]


def test_an_interrupted_file_is_not_there(places, tmp_path):
    class Failing(list):
        def id(self, index):
            return str(index)

        def __getitem__(self, index):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.pack(Failing([1, 2]), tmp_path / "a.array_record")
    assert (
        not list(tmp_path.glob("*.array_record*part"))
        and not (tmp_path / "a.array_record").exists()
    )
