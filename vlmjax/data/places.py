"""Where the records of a source lie in its files: found once, kept, and mapped by every process.

    places = kept(files, folder) or Places(state(files), fingerprint, {"bounds": bounds}, {})
    places = places.keep(folder)        # beside the length index

To find them all annotations or all headers are read, which takes minutes where files are large or
many. What is kept counts as long as size and time of change of every file are what they were.
"""

import json
import os
from pathlib import Path

import numpy as np

VERSION = 1  # of what the arrays mean


class Places:
    """What was found in files.

    Attributes:
      files: `state` of them, from before they were read.
      fingerprint: of their content.
      arrays: {name: array}, none of them empty.
      facts: {name: what JSON holds}.
    """

    def __init__(self, files, fingerprint, arrays, facts):
        self.files, self.fingerprint, self.arrays, self.facts = files, fingerprint, arrays, facts
        self._folder = None

    def __reduce__(self):
        parts = self.files, self.fingerprint, self.arrays, self.facts
        if self._folder is None:
            return Places, parts
        return _mapped, (self._folder, *parts[:2], tuple(self.arrays), self.facts)

    def keep(self, folder):
        """Returns the same places, mapped from a folder; what is not there yet is written."""
        folder = Path(folder)
        if there := _find(folder, self.files):
            return there
        for name, array in self.arrays.items():
            part = folder / "places.part"
            with open(part, "wb") as file:
                np.save(file, array)
            os.replace(part, _file(folder, self.fingerprint, name))
        found = {"version": VERSION, "files": self.files, "fingerprint": self.fingerprint}
        found |= {"arrays": list(self.arrays), "facts": self.facts}
        (folder / "places.part").write_text(json.dumps(found))
        os.replace(folder / "places.part", folder / "places.json")  # last: the arrays are there
        return _mapped(folder, self.files, self.fingerprint, self.arrays, self.facts)


def state(files):
    """Returns [[path, size, time of change]] of files."""
    found = [(os.path.abspath(file), os.stat(file)) for file in files]
    return [[path, status.st_size, status.st_mtime_ns] for path, status in found]


def kept(files, folder):
    """Returns the `Places` in a folder, or None where none are of these files as they are now."""
    return None if folder is None else _find(Path(folder), state(files))


def _find(folder, files):
    file = folder / "places.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("version") != VERSION or found["files"] != files:
        return None
    return _mapped(folder, *(found[name] for name in ("files", "fingerprint", "arrays", "facts")))


def _file(folder, fingerprint, name):
    return folder / f"places-{fingerprint[:16]}-{name}.npy"


def _mapped(folder, files, fingerprint, names, facts):
    arrays = {
        name: np.asarray(np.load(_file(folder, fingerprint, name), mmap_mode="r")) for name in names
    }
    places = Places(files, fingerprint, arrays, facts)
    places._folder = folder
    return places
