"""ArrayRecord files of `record_bytes`, media included: what `data pack` writes."""

import functools
import os

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from vlmjax.data import record_bytes
from vlmjax.data.health import BadRecord
from vlmjax.data.shards import digest, expand

_OPTIONS = "group_size:1,uncompressed"  # read one at a time; media are compressed already


class ArrayRecordSource:
    """Records of ArrayRecord files given by a path, a glob or a brace pattern."""

    def __init__(self, pattern):
        self.pattern, self.files = pattern, expand(pattern, "ArrayRecord file")
        self.fingerprint = digest(self.files)
        if not len(self):
            raise ValueError(f"{pattern} holds no records; it needs at least one")

    @functools.cached_property
    def _data(self):
        try:
            return ArrayRecordDataSource(self.files)
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(
                f"{self.pattern} is not whole ArrayRecord files ({error}): write them again"
            ) from error

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_data"}

    def __len__(self):
        return len(self._data)

    def id(self, index):
        return f"{self.pattern}:{range(len(self))[index]}"

    def __getitem__(self, index):
        name = self.id(index)
        try:
            data = self._data[index]
        except (ValueError, RuntimeError, OSError) as error:
            raise BadRecord("damaged_media", f"{name} cannot be read: {error}") from error
        try:
            return record_bytes.decode(data)
        except BadRecord as error:
            raise BadRecord(error.reason, f"{name}: {error}") from error


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
