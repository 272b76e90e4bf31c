"""ArrayRecord files of `record_bytes`, media included: what `data pack` writes."""

import errno
import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vlmjax.data import record_bytes
from vlmjax.data.health import BadRecord
from vlmjax.data.shards import digest, expand

OPEN = 128  # files that a process holds open
_OPTIONS = "group_size:1,uncompressed"  # read one at a time; media are compressed already
_READING = "readahead_buffer_size:0"  # any record, no matter which one came before
_SYSTEM = re.compile(r"\w+\(\) failed: ([^;]+)")
_OF_A_FILE = ("ENOENT", "ENOTDIR", "ELOOP", "ENAMETOOLONG", "EACCES", "EISDIR", "EINVAL")


class ArrayRecordSource:
    """Records of ArrayRecord files given by a path, a glob or a brace pattern."""

    def __init__(self, pattern):
        self.pattern, self.files = pattern, expand(pattern, "ArrayRecord file")
        self.fingerprint = digest(self.files)
        try:
            with ThreadPoolExecutor(16) as threads:
                self._ends = np.cumsum(list(threads.map(_count, self.files)))
        except (ValueError, RuntimeError, OSError) as error:
            check_machine(error, pattern)
            raise ValueError(
                f"{pattern} is not whole ArrayRecord files ({error}): write them again"
            ) from error
        if not len(self):
            raise ValueError(f"{pattern} holds no records; it needs at least one")

    def __len__(self):
        return int(self._ends[-1])

    def id(self, index):
        return f"{self.pattern}:{range(len(self))[index]}"

    def __getitem__(self, index):
        name, index = self.id(index), range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, "right"))
        place = index - (int(self._ends[number - 1]) if number else 0)
        try:
            (data,) = _reader(self.files[number], self.fingerprint).read([place])
        except (ValueError, RuntimeError, OSError) as error:
            check_machine(error, name)
            raise BadRecord("damaged_media", f"{name} cannot be read: {error}") from error
        try:
            return record_bytes.decode(data)
        except BadRecord as error:
            raise BadRecord(error.reason, f"{name}: {error}") from error


def check_machine(error, what):
    """Raises OSError where an error of the reader is of the machine: no record is to blame for it.

    Args:
      error: whose text says which call of the system failed, and how.
      what: was read.
    """
    failed = _SYSTEM.search(str(error))
    for code, name in errno.errorcode.items():
        if failed and failed[1].strip() == os.strerror(code) and name not in _OF_A_FILE:
            raise OSError(code, f"{error}, while {what} was read") from error


def _count(file):
    reader = ArrayRecordReader(file)
    try:
        return reader.num_records()
    finally:
        reader.close()


@functools.lru_cache(OPEN)
def _reader(file, fingerprint):
    """Returns the reader of a file; one that is dropped closes its file behind its last user."""
    del fingerprint  # of the files that this is one of: others have other readers
    return ArrayRecordReader(file, options=_READING, file_reader_buffer_size=1 << 15)


class Writer:
    """Writes records to a file that is there, whole, only once the `with` block has ended well."""

    def __init__(self, file):
        self.file, self._part = os.fspath(file), f"{os.fspath(file)}.{os.getpid()}.part"

    def __enter__(self):
        self._writer = ArrayRecordWriter(self._part, _OPTIONS)
        return self

    def write(self, record):
        self._writer.write(record_bytes.encode(record))

    def __exit__(self, kind, error, trace):
        self._writer.close()
        if kind is None:
            os.replace(self._part, self.file)
        else:
            os.unlink(self._part)
