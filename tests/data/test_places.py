"""Places of records are found once, and again when a file has changed."""

import os
import pickle

import numpy as np
import pytest
import source_files as files

from vlmjax.data import jsonl, tar
from vlmjax.data.sources import open_source


@pytest.fixture(params=["lines", "list", "tar"])
def made(request, tmp_path, make_video):
    """A spec of the five records, its first file and the folder that media paths start in."""
    media, there = tmp_path / "media", tmp_path / "there"
    there.mkdir()
    files.make_media(media, make_video("source.mp4", [40 * k for k in range(60)]))
    if request.param == "tar":
        return files.write_tars(there, media), there / "x-000.tar", media
    write = files.write_jsonl if request.param == "lines" else files.write_json
    return write(there / "a.json", files.annotations()), there / "a.json", media


@pytest.fixture
def scans(monkeypatch):
    """The files that were read for their places, in order."""
    found = []
    for module in (jsonl, tar):

        def counted(*what, scan=module._scanned):
            found.append(what[0])
            return scan(*what)

        monkeypatch.setattr(module, "_scanned", counted)
    return found


def same(a, b):
    assert len(a) == len(b) == 5 and a.fingerprint == b.fingerprint
    assert [a.id(k) for k in range(5)] == [b.id(k) for k in range(5)]
    for k in (0, 1, 2, 4):
        assert a[k] == b[k]


def test_kept_places_are_those_that_were_found(made, scans, tmp_path):
    spec, _, media = made
    first = open_source(spec, media, 0, tmp_path)  # where nothing is yet
    first.keep(tmp_path)
    again = open_source(spec, media, 0, tmp_path)
    assert len(scans) == 1
    found = open_source(spec, media, 0)
    assert len(scans) == 2
    for source in (first, again, pickle.loads(pickle.dumps(again))):
        same(source, found)
    if spec.startswith("tar:"):
        assert again.ignored == found.ignored
    arrays = pickle.loads(pickle.dumps(first)).places.arrays.values()  # as a worker has them
    assert all(isinstance(array.base, np.memmap) for array in arrays)


@pytest.mark.parametrize("change", ["time", "size"])
def test_files_that_have_changed_are_read_again(made, scans, tmp_path, change):
    spec, file, media = made
    open_source(spec, media, 0).keep(tmp_path)
    if change == "time":
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    else:
        status = file.stat()
        file.write_bytes(file.read_bytes() + b"\n" * 512)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    source = open_source(spec, media, 0, tmp_path)
    assert len(scans) == 2
    source.keep(tmp_path)
    same(open_source(spec, media, 0, tmp_path), source)
    assert len(scans) == 2
