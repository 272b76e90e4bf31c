"""Tar shards: grouping, order, and members that must never be followed."""

import json
import pickle
import subprocess
import sys
import tarfile

import pytest
import source_files as files

from vlmjax.data.health import BadRecord
from vlmjax.data.sources import open_source
from vlmjax.data.tar import TarSource

SAID = json.dumps({"conversations": files.turns("<image>")}).encode()
RED = files.picture("red", "PNG")


def shard(folder, *members, name="a.tar", **options):
    """Writes (name, data, fields) members; returns the source."""
    with tarfile.open(folder / name, "w", **options) as tar:
        for member, data, *fields in members:
            files.add(tar, member, data, **(fields[0] if fields else {}))
    return open_source(f"tar:{folder}/{name}", folder, 0)


def test_captions_keys_and_kinds(tmp_path):
    source = shard(
        tmp_path,
        ("x/k.1.PNG", RED),
        ("y.png", RED),
        ("x/k.1.txt", b" a red \xc3\xbc square\n"),
        ("y.cls", b"3"),
        ("y.json", SAID),
        ("README", b"text"),
        ("._y.png", b"resource fork"),
        ("z.json", json.dumps({"conversations": files.turns("")}).encode()),
        ("folder", b"", {"type": tarfile.DIRTYPE}),
        ("l" * 150 + ".json", json.dumps({"conversations": files.turns("")}).encode()),
    )
    assert [source.id(i).rpartition(":")[2] for i in range(4)] == ["x/k", "y", "z", "l" * 150]
    assert dict(source.ignored) == {"kind .cls": 1, "no key": 2}
    messages = source[0]["messages"]
    assert messages[0]["content"] == [{"type": "image", "image": RED}]
    assert messages[1]["content"] == "a red ü square"
    assert source[1]["messages"][0]["content"][0]["image"] == RED
    assert isinstance(source[2]["messages"][0]["content"], (str, list))


def test_numbered_media_come_in_order_of_their_numbers(tmp_path):
    said = json.dumps({"conversations": files.turns("<image>" * 3)}).encode()
    sizes = {2: (20, 30), 10: (21, 30), 9: (22, 30)}
    blobs = {k: files.picture("red", "PNG", size) for k, size in sizes.items()}
    members = [(f"k.{k}.png", blob) for k, blob in blobs.items()]
    source = shard(tmp_path, *members, ("k.json", said))
    shown = [p["image"] for p in source[0]["messages"][0]["content"] if p["type"] == "image"]
    assert shown == [blobs[2], blobs[9], blobs[10]]
    named = {"image": ["b.png", "a.png"], "conversations": files.turns("<image><image>")}
    source = shard(
        tmp_path, ("k.a.png", RED), ("k.b.png", RED), ("k.json", json.dumps(named).encode())
    )
    with pytest.raises(BadRecord, match="another order") as caught:
        source[0]
    assert caught.value.reason == "malformed"


def test_a_document_names_its_members_in_place(tmp_path):
    row = {"images": [None, "k.1.png", None, "k.2.png"], "texts": ["a", None, "b", None]}
    blue = files.picture("blue", "PNG")
    members = [("k.1.png", RED), ("k.2.png", blue), ("k.json", json.dumps(row).encode())]
    (message,) = shard(tmp_path, *members)[0]["messages"]
    assert [p.get("image", p.get("text")) for p in message["content"]] == ["a", RED, "b", blue]


LINK = {"type": tarfile.SYMTYPE, "linkname": "../../etc/passwd"}


@pytest.mark.parametrize(
    "name,fields",
    [
        ("k.png", LINK),
        ("k.png", LINK | {"linkname": "other.png"}),
        ("k.png", {"type": tarfile.LNKTYPE, "linkname": "y.png"}),
        ("k.png", {"type": tarfile.CHRTYPE}),
        ("k.png", {"type": tarfile.FIFOTYPE}),
        ("../k.png", {}),
        ("/k.png", {}),
        ("a/../../k.png", {}),
    ],
)
def test_members_that_lead_elsewhere(tmp_path, name, fields):
    data = RED if not fields else b""
    source = shard(
        tmp_path, ("y.png", RED), ("y.json", SAID), (name, data, fields), ("k.json", SAID)
    )
    found = {source.id(i).rpartition(":")[2]: i for i in range(len(source))}
    assert source[found["y"]]["messages"]
    with pytest.raises(BadRecord, match="links or devices") as caught:
        source[found["k"]]
    assert caught.value.reason == "outside_root"


@pytest.mark.parametrize(
    "members,reason",
    [
        ([("k.png", b""), ("k.json", SAID)], "missing_file"),
        ([("k.png", RED)], "malformed"),
        ([("k.txt", b"words")], "missing_file"),
        ([("k.png", RED), ("k.txt", b"\xff\xfe")], "malformed"),
        ([("k.png", RED), ("k.txt", b"a"), ("k.json", SAID)], "malformed"),
        ([("k.png", RED), ("k.json", b"{")], "malformed"),
        ([("k.png", RED[:-60]), ("k.json", SAID)], "damaged_media"),
        ([("k.json", b'{"image": "a.png", ' + SAID[1:])], "missing_file"),
    ],
)
def test_unusable_records(tmp_path, members, reason, make_processor):
    source = shard(tmp_path, *members)
    with pytest.raises(BadRecord) as caught:
        make_processor(min_visual_tokens=1)(source[0])
    assert caught.value.reason == reason


def test_json_cannot_name_files_outside(tmp_path):
    """Media are members; what a name in JSON stands for is never opened."""
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(RED)
    (tmp_path / "root/link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", "link.png", str(tmp_path / "secret.png")):
        said = {"image": name, "conversations": files.turns("<image>")}
        shard(tmp_path, ("k.json", json.dumps(said).encode()))
        source = open_source(f"tar:{tmp_path}/a.tar", tmp_path / "root", 0)
        with pytest.raises(BadRecord):
            source[0]


@pytest.mark.parametrize("damage", ["gz", "cut", "header"])
def test_shards_that_cannot_be_read_by_offset(tmp_path, damage):
    shard(tmp_path, *[(f"{k}.json", SAID * 40) for k in range(9)])
    data = (tmp_path / "a.tar").read_bytes()
    if damage == "gz":
        with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
            files.add(tar, "k.json", SAID)
    else:
        cut = len(data) // 3
        damaged = data[:cut] if damage == "cut" else b"\xff" * 512 + data[512:]
        (tmp_path / "a.tar").write_bytes(damaged)
    with pytest.raises(ValueError, match="a.tar.*cannot be read.*plain .tar files"):
        open_source(f"tar:{tmp_path}/a.tar", tmp_path, 0)


@pytest.mark.parametrize("size", [-512, -1024])
def test_members_that_lead_back(tmp_path, size):
    """Sizes below nothing: reading headers would go round for ever, or pass over members."""
    shard(tmp_path, *[(f"{k}.json", SAID) for k in range(3)])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    second = data.index(b"1.json")
    header = tarfile.TarInfo("1.json")
    header.size = size
    data[second : second + 512] = header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=f"a.tar.*cannot be read .a member of size {size}"):
        open_source(f"tar:{tmp_path}/a.tar", tmp_path, 0)


def test_many_shards_are_read_by_processes(tmp_path):
    for n in range(3):
        shard(tmp_path, (f"{n}a.txt", b"a"), (f"{n}a.png", RED), ("x.cls", b""), name=f"{n}.tar")
    one = TarSource(f"{tmp_path}/*.tar", tmp_path)
    script = tmp_path / "open.py"  # that has no guard: whoever imports it opens the shards
    script.write_text(
        "import pickle, sys, vlmjax.data.tar as tar\n"
        "tar.MANY = 2\n"
        f"source = tar.TarSource({f'{tmp_path}/*.tar'!r}, {str(tmp_path)!r})\n"
        "sys.stdout.buffer.write(pickle.dumps(source))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    many = pickle.loads(done.stdout)
    assert one.fingerprint == many.fingerprint and one.ignored == many.ignored
    assert [one[k] for k in range(3)] == [many[k] for k in range(3)] and len(many) == 3
