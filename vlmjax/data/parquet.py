"""Hugging Face parquet files through `datasets`, as rows of `data.rows`.

`datasets` turns them once into an Arrow file under HF_DATASETS_CACHE, from which rows are read
through a memory map; processes that open the same files wait for the first. Pictures stay encoded.
"""

import functools
import glob
import hashlib
import os

import pyarrow.parquet
from datasets import Dataset

from vlmjax.data import rows
from vlmjax.data.shards import expand, read_span


class ParquetSource:
    """Records of parquet files given by a path, a glob or a brace pattern."""

    def __init__(self, pattern, media_root):
        self.pattern, self.media_root = pattern, media_root
        self.files = expand(pattern, "parquet file")
        self.fingerprint = _digest(self.files)
        if not len(self):
            raise ValueError(f"{pattern} holds no rows; it needs at least one")

    @functools.cached_property
    def _table(self):
        files = [glob.escape(os.path.abspath(file)) for file in self.files]
        return Dataset.from_parquet(files).with_format("arrow")

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_table"}

    def __len__(self):
        return len(self._table)

    def id(self, index):
        return f"{self.pattern}:{range(len(self))[index]}"

    def __getitem__(self, index):
        name = self.id(index)
        (row,) = self._table[[index]].to_pylist()
        return rows.to_record(row, self.media_root, id=name)


def _digest(files):
    """Returns a hex digest of the footers: schema, and size and place of every column chunk."""
    found = hashlib.sha256()
    for file in files:
        try:
            pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"parquet file {file!r} cannot be read ({error}): fetch it again"
            ) from error
        size = os.path.getsize(file)
        footer = int.from_bytes(read_span(file, size - 8, size - 4), "little")
        found.update(f"{os.path.basename(file)}\0{size}\0".encode())
        found.update(read_span(file, max(size - 8 - footer, 0), size))
    return found.hexdigest()
