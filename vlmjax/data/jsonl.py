"""Annotations of a JSON list or of JSON lines, read one by one by their place in the file.

Opening reads the file once, in pieces, for the places and the digest; what stays in memory are
eight bytes an annotation, or none where they are kept (`places`).
"""

import functools
import hashlib
from pathlib import Path

import numpy as np

from vlmjax.data import rows
from vlmjax.data.places import Places, kept, state
from vlmjax.data.shards import AbsentFiles, read_span

_PIECE = 1 << 22
_PROBED = 10  # annotations of which one must be readable
_QUOTE, _ESCAPE, _COMMA = b'"\\,'
_BLANK = bytes(range(33))
_OPEN, _CLOSE = (ord("["), ord("{")), (ord("]"), ord("}"))


class JsonSource:
    """Annotations of a JSON or JSONL file; media paths are relative to `media_root`, inside it."""

    def __init__(self, file, media_root, folder=None):
        """Opens it; `folder` is where its places may be kept."""
        self.file, self.media_root = str(file), media_root
        if not Path(file).is_file():
            raise AbsentFiles(f"{file} is not a file: correct the path of the annotations")
        self.places = kept([file], folder) or _scanned(file)
        self.fingerprint = self.places.fingerprint
        if not len(self):
            raise ValueError(f"{file} holds no annotations; it needs at least one")
        self._probe()

    def keep(self, folder):
        """Keeps its places in a folder, from which it reads them itself from now on."""
        self.places = self.places.keep(folder)

    def __len__(self):
        return len(self.places.arrays["bounds"]) - 1

    def id(self, index):
        return f"{self.file}:{range(len(self))[index]}"

    def __getitem__(self, index):
        name = self.id(index)
        return rows.to_record(self._row(index), self.media_root, id=name)

    def _row(self, index):
        start, stop = map(int, self.places.arrays["bounds"][index : index + 2])
        rows.check_size(stop - start, self.id(index), rows.MAX_TEXT)
        text = read_span(self.file, start, stop - self.places.facts["comma"]).rstrip(_BLANK)
        return rows.parse(text, self.id(index))

    def _probe(self):
        errors = []
        for index in range(min(_PROBED, len(self))):
            try:
                return self._row(index)
            except ValueError as error:
                errors.append(error)
        raise ValueError(
            f"{self.file} is neither a JSON list nor one JSON object a line: {errors[0]}"
        )


def _scanned(file):
    """Returns the `Places` of annotations: their bounds, and how many bytes lie between two."""
    found, before = hashlib.sha256(), state([file])
    start, is_list = _beginning(file)
    scan = _list_bounds if is_list else _line_bounds
    bounds = scan(_pieces(file, start, found), start, file)
    return Places(before, found.hexdigest(), {"bounds": bounds}, {"comma": int(is_list)})


def _beginning(file):
    """Returns (offset behind a byte order mark, whether the file is a list)."""
    with open(file, "rb") as opened:
        start = 3 if opened.read(3) == b"\xef\xbb\xbf" else 0
        opened.seek(start)
        for piece in iter(functools.partial(opened.read, _PIECE), b""):
            if first := piece.lstrip()[:1]:
                return start, first == b"["
    return start, False


def _pieces(file, start, found):
    """Yields the bytes of a file from an offset on, and adds all of them to a digest."""
    with open(file, "rb", buffering=0) as opened:
        found.update(opened.read(start))
        for piece in iter(functools.partial(opened.read, _PIECE), b""):
            found.update(piece)
            yield piece


def _line_bounds(pieces, offset, file):
    """Returns i64: where each line that is not blank starts, and where the last ends."""
    del file
    starts, start, filled = [], offset, False
    for piece in pieces:
        data = np.frombuffer(piece, np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        first = np.append(0, ends + 1)  # of each line in the piece
        inner = first < len(data)
        some = np.zeros(len(first), bool)
        some[inner] = np.logical_or.reduceat(data > ord(" "), first[inner])
        some[0] |= filled
        begins = np.append(start, ends + 1 + offset)
        full, filled, start = some[:-1], bool(some[-1]), begins[-1]
        starts.append(begins[:-1][full])
        offset += len(data)
    last = [start, offset] if filled else [start]
    return np.concatenate([*starts, last]).astype(np.int64)


def _list_bounds(pieces, offset, file):
    """Returns i64: where each item of a JSON list starts, and where the list ends.

    What is between quotes is told apart by counting them (those behind an odd number of backslashes
    are none), what is deeper by counting brackets; items lie between the commas of the list itself.
    """
    marks, depth, quoted, rest, ended = [], 0, 0, b"", False
    for piece in pieces:
        data = np.frombuffer(rest + piece, np.uint8)
        base, offset = offset - len(rest), offset + len(piece)
        escapes = np.flatnonzero(data == _ESCAPE)
        new = np.diff(escapes, prepend=-2) > 1
        runs = np.diff(np.append(np.flatnonzero(new), len(escapes)))
        behind = escapes[np.append(new[1:], True)] + 1 if len(escapes) else escapes
        odd = behind[runs % 2 == 1]
        rest = b"\\" if len(odd) and odd[-1] == len(data) else b""
        quotes = data == _QUOTE
        quotes[odd[odd < len(data)]] = False
        quotes = np.flatnonzero(quotes)
        opens = (data == _OPEN[0]) | (data == _OPEN[1])
        closes = (data == _CLOSE[0]) | (data == _CLOSE[1])
        places = np.flatnonzero(opens | closes | (data == _COMMA))
        places = places[(np.searchsorted(quotes, places) + quoted) % 2 == 0]
        quoted = (quoted + len(quotes)) % 2
        steps = opens[places].astype(np.int64) - closes[places]
        after = depth + np.cumsum(steps)
        last = np.flatnonzero((steps < 0) & (after == 0))
        if len(last) or ended:
            behind = 0 if ended else places[last[0]] + 1
            if (data[behind:] > ord(" ")).any():
                raise ValueError(
                    f"{file} has text behind the list that it begins with: keep a single list"
                )
            ended = True
        at = (steps == 0) & (after == 1) | (steps > 0) & (after == 1) | (steps < 0) & (after == 0)
        marks.append(places[at] + base)
        depth = int(after[-1]) if len(after) else depth
    if not ended:
        raise ValueError(f"{file} is a JSON list without an end: it is truncated, fetch it again")
    bounds = np.concatenate(marks).astype(np.int64) + 1
    if len(bounds) == 2 and not read_span(file, int(bounds[0]), int(bounds[1]) - 1).strip():
        return bounds[:1]
    return bounds
