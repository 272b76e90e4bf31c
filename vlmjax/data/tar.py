"""Webdataset shards: plain tar files whose members with one key are a record.

    000007.jpg 000007.json    an annotation; what it names as its media are the members
    000008.jpg 000008.txt     a caption, which is the answer to the picture alone
    000009.0.jpg 000009.1.jpg 000009.json    two pictures, in order of their names

Opening reads the headers of all members; records are read by offset, and nothing is ever unpacked.
Only regular files count: a link, a device or a name that leads outside makes its record a
BadRecord, whoever follows it elsewhere. Files without a key or of a kind that is not known are left
out and counted in `ignored`.
"""

import contextlib
import hashlib
import os
import posixpath
import re
import tarfile
from collections import Counter
from pathlib import PurePosixPath

import numpy as np
from tqdm import tqdm

from vlmjax.data import rows
from vlmjax.data.health import BadRecord
from vlmjax.data.loading import load
from vlmjax.data.shards import expand, read_span

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
VIDEOS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "ogv")
KINDS = ("image", "video", "json", "txt", "bad")
_KIND = dict.fromkeys(IMAGES, 0) | dict.fromkeys(VIDEOS, 1) | {"json": 2, "txt": 3}
_BAD = KINDS.index("bad")
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # up to the first dot of the file's name
_DIGITS = re.compile(r"(\d+)")
MANY = 16  # shards, from which on processes are worth their start
PROCESSES = 16  # at most; reading headers is waiting for a file system
STALL = 1800.0  # seconds after which a shard that is not read to its end counts as lost


class TarSource:
    """Records of tar shards given by a path, a glob or a brace pattern."""

    def __init__(self, pattern, media_root):
        self.files, self.media_root = expand(pattern, "tar shard"), media_root
        self.ignored, found = Counter(), hashlib.sha256()
        keys, counts, members, shards = [], [], [], []
        for number, (digest, ignored, groups) in enumerate(_indexed(self.files)):
            found.update(digest)
            self.ignored += ignored
            for key, group in groups.items():
                keys.append(key.encode("utf-8", "surrogateescape"))
                counts.append(len(group))
                members += group
                shards.append(number)
        if not keys:
            raise ValueError(
                f"{pattern} holds no records, only {dict(self.ignored)}: members are named "
                "KEY.jpg, KEY.json"
            )
        self.fingerprint = found.hexdigest()
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *map(len, keys)])
        self._first = np.cumsum([0, *counts])
        self._members = np.array(members, np.int64)  # [members, (start, stop, kind)]
        self._shards = np.array(shards, np.int32)

    def __len__(self):
        return len(self._shards)

    def id(self, index):
        index = range(len(self))[index]
        key = self._keys[self._key_ends[index] : self._key_ends[index + 1]]
        return f"{self.files[self._shards[index]]}:{key.decode('utf-8', 'replace')}"

    def __getitem__(self, index):
        name = self.id(index)
        file = self.files[self._shards[index]]
        found = {kind: [] for kind in KINDS}
        for start, stop, kind in self._members[self._first[index] : self._first[index + 1]]:
            found[KINDS[kind]].append((int(start), int(stop)))
        if found["bad"]:
            raise BadRecord(
                "outside_root",
                f"{name} has {len(found['bad'])} members that are links or devices, or whose names "
                "lead outside: pack the files themselves",
            )
        texts = found["json"] + found["txt"]
        if len(texts) != 1:
            raise BadRecord(
                "malformed", f"{name} has {len(texts)} .json and .txt members: one is needed"
            )
        media = {kind: [self._read(file, *at, name) for at in found[kind]] for kind in KINDS[:2]}
        text = self._read(file, *texts[0], name, rows.MAX_TEXT)
        row = rows.parse(text, name) if found["json"] else _captioned(text, media, name)
        for kind, blobs in media.items():
            row |= _filled(row, kind, blobs, name)
        return rows.to_record(row, self.media_root, id=name)

    def _read(self, file, start, stop, name, most=rows.MAX_BYTES):
        rows.check_size(stop - start, name, most)
        data = read_span(file, start, stop)
        if len(data) != stop - start:
            raise BadRecord("damaged_media", f"{name} lies behind the end of its shard: truncated")
        return data


def _filled(row, kind, blobs, name):
    """Returns the columns of a kind with the members of the record, in place of what it names."""
    names = row.get(kind) if row.get(kind) is not None else row.get(f"{kind}s")
    listed = names if isinstance(names, list) else [names]
    given = [n for n in listed if n is not None]
    if not given:
        return {kind: blobs, f"{kind}s": None}
    if len(given) != len(blobs):
        raise BadRecord(
            "missing_file" if len(given) > len(blobs) else "placeholders",
            f"{name} names {len(given)} {kind} files and has {len(blobs)} members: pack them all",
        )
    ordered = sorted(given, key=lambda n: _natural(posixpath.basename(str(n))))
    if ordered != given:
        raise BadRecord(
            "malformed", f"{name} names its media in another order than that of their names"
        )
    left = iter(blobs)
    return {kind: None, f"{kind}s": [n if n is None else next(left) for n in listed]}


def _captioned(text, media, name):
    tags = "".join(f"<{kind}>" * len(blobs) for kind, blobs in media.items())
    if not tags:
        raise BadRecord("missing_file", f"{name} is a caption without a picture or video")
    try:
        caption = text.decode().strip()
    except UnicodeDecodeError as error:
        raise BadRecord("malformed", f"{name} has a caption that is not UTF-8") from error
    turns = [{"from": "human", "value": tags}, {"from": "gpt", "value": caption}]
    return {"conversations": turns}


def _indexed(files):
    """Yields what `_samples` returns of each shard; of many, read by several processes."""
    if len(files) < MANY:
        yield from map(_samples, files)
        return
    workers = min(PROCESSES, len(files), _cores())
    with contextlib.closing(
        load(_Headers(), keys=files, workers=workers, ahead=2 * workers, stall=STALL)
    ) as found:
        yield from tqdm(found, "headers", len(files), unit=" shards")


def _cores():
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class _Headers:
    """What is in shards, by their paths, for workers."""

    def __getitem__(self, file):
        return _samples(file)


def _samples(file):
    """Returns (digest, counts of what is left out, {key: [(start, stop, kind)]}) of a shard."""
    groups, ignored = {}, Counter()
    found = hashlib.sha256(f"{os.path.basename(file)}\0{os.path.getsize(file)}\0".encode())
    try:
        with tarfile.open(file, "r:") as shard:
            last = -1
            while (member := shard.next()) is not None:
                shard.members.clear()  # it keeps them all
                if member.size < 0 or member.offset <= last:  # as headers can say, without end
                    raise tarfile.ReadError(f"a member of size {member.size} that leads back")
                last = member.offset
                place = (member.offset_data, member.offset_data + member.size)
                found.update(
                    f"{member.name}\0{place}{member.mtime}{member.chksum}\0".encode(
                        "utf-8", "surrogateescape"
                    )
                )
                if member.isdir():
                    continue
                key, kind = _named(member)
                if kind is None:
                    ignored[key] += 1
                else:
                    groups.setdefault(key, []).append((member.name, (*place, kind)))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"tar shard {file!r} cannot be read ({error}), plain .tar files are needed: unpack "
            "compressed ones, fetch damaged ones again"
        ) from error
    ordered = {
        key: [place for _, place in sorted(group, key=lambda member: _natural(member[0]))]
        for key, group in groups.items()
    }
    return found.digest(), ignored, ordered


def _natural(name):
    """Returns a key that sorts "a.10.jpg" behind "a.9.jpg"."""
    pieces = _DIGITS.split(name)
    return [int(piece) if k % 2 else piece for k, piece in enumerate(pieces)]


def _named(member):
    """Returns (key, kind) of a member, or (why it is left out, None)."""
    named = _KEY.fullmatch(member.name)
    if not named or PurePosixPath(member.name).name.startswith("."):
        return "no key", None
    key, extension = named.groups()
    outside = member.name.startswith("/") or ".." in member.name.split("/")
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if outside or not plain:
        return posixpath.normpath("/" + key).lstrip("/"), _BAD
    kind = _KIND.get(extension.rpartition(".")[2].lower())
    return (key, kind) if kind is not None else (f"kind .{extension}", None)
