"""Files of a source: patterns, digests, and reads by offset that need no open file."""

import glob
import hashlib
import itertools
import os
import re
from pathlib import Path

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class AbsentFiles(ValueError):
    """Nothing of what a source is made of is there."""


def expand(pattern, what):
    """Returns the files of a path, a glob or a brace pattern, in order.

    Example: "a-{00000..00010}.tar" is eleven files, "{x,y}/*.tar" those of two folders.

    Args:
      pattern: str.
      what: the files' kind for messages.

    Raises:
      AbsentFiles: none of them is there; ValueError where only some are.
    """
    if "://" in pattern:
        raise ValueError(f"{what} {pattern!r} is a URL, only local files are read: download it")
    pieces = _BRACES.split(pattern)  # text, inside of braces, text, ...
    choices = [_choices(piece) if k % 2 else [piece] for k, piece in enumerate(pieces)]
    files, missing = [], []
    for option in map("".join, itertools.product(*choices)):
        found = [option] if Path(option).is_file() else sorted(glob.glob(option))
        found = [file for file in found if Path(file).is_file()]
        files += found
        if not found:
            missing.append(option)
    if missing and not files:
        raise AbsentFiles(f"{what} {missing[0]!r} is no file and matches none: correct the pattern")
    if missing:
        raise ValueError(
            f"{len(missing)} of the {what}s of {pattern!r} are not there, {len(files)} are: fetch "
            f"them or correct the pattern. Missing are {missing[:20]}"
        )
    return files


def _choices(inside):
    numbers = _RANGE.fullmatch(inside)
    if not numbers:
        return inside.split(",")
    first, last = numbers.groups()
    return [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]


def read_span(file, start, stop):
    """Returns the bytes [start, stop) of a file; it is opened for this, so any thread may."""
    with open(file, "rb", buffering=0) as opened:
        opened.seek(start)
        pieces = []
        while start < stop:
            pieces.append(opened.read(min(stop - start, 1 << 30)))
            if not pieces[-1]:
                break
            start += len(pieces[-1])
    return b"".join(pieces)


def digest(files, ends=1 << 16):
    """Returns a hex digest of the names, sizes, first and last bytes of files.

    Formats that end with an index of their content change there when it does.
    """
    found = hashlib.sha256()
    for file in files:
        size = os.path.getsize(file)
        found.update(f"{Path(file).name}\0{size}\0".encode())
        found.update(read_span(file, 0, min(size, ends)))
        found.update(read_span(file, max(size - ends, 0), size))
    return found.hexdigest()
