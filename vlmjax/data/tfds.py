"""Prepared TFDS datasets in ArrayRecord format, read without TensorFlow, as rows of `data.rows`.

Features, all but the turns optional:
    id                       Text or an integer
    image, images            Image, or Text with a path inside the media root; or a Sequence of
                             either
    video                    Text with a path, or with the bytes of a video file (they hold a NUL)
    conversations, messages  Sequence({"from": Text, "value": Text}) or of role and content, or Text
                             with JSON
    stream, conversation     of streams: Scalar bool, Text with JSON
Pictures stay encoded.
"""

import contextlib
import functools
import json
from pathlib import Path

import tensorflow_datasets as tfds

from vlmjax.data import rows
from vlmjax.data.array_record import check_machine
from vlmjax.data.health import BadRecord
from vlmjax.data.shards import AbsentFiles, digest

_TURNS = ("conversations", "conversation", "messages")


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves the pictures of a sequence encoded, too."""

    def decode_batch_example_np(self, example):
        return example


class TfdsSource:
    """Records of a split of a dataset's folder, "DIR" or "DIR#SPLIT" (train unless told)."""

    def __init__(self, where, media_root):
        self.folder, _, split = where.partition("#")
        self.split, self.media_root = split or "train", media_root
        if "://" in self.folder:
            raise ValueError(f"TFDS folder {self.folder!r} is a URL, only local ones are read")
        if not Path(self.folder).is_dir():
            raise AbsentFiles(f"TFDS folder {self.folder!r} is not there: correct the path")
        with self._explained():
            info = tfds.builder_from_directory(self.folder).info
            files = info.splits[self.split].filepaths
            self.fingerprint = digest(map(str, files))
            if not len(self):
                raise ValueError("it is empty")

    @functools.cached_property
    def _rows(self):
        with self._explained():
            builder = tfds.builder_from_directory(self.folder)
            features = builder.info.features
            decoders = {name: _Encoded() for name in features if _is_image(features[name])}
            return builder.as_data_source(split=self.split, decoders=decoders)

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except (KeyError, ValueError, OSError, NotImplementedError) as error:
            raise ValueError(
                f"{self.folder} has no TFDS split {self.split!r} in ArrayRecord format ({error}): "
                "give DIR#SPLIT of a prepared dataset"
            ) from error

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_rows"}

    def __len__(self):
        return len(self._rows)

    def id(self, index):
        return f"{self.folder}#{self.split}:{range(len(self))[index]}"

    def __getitem__(self, index):
        name = self.id(index)
        try:
            example = self._rows[index]
        except (ValueError, RuntimeError, OSError) as error:
            check_machine(error, name)
            raise BadRecord("damaged_media", f"{name} cannot be read: {error}") from error
        try:
            row = {key: _plain(value) for key, value in example.items()}
            for key in _TURNS:
                if isinstance(row.get(key), str):
                    row[key] = json.loads(row[key])
        except (ValueError, RecursionError) as error:
            raise BadRecord("malformed", f"{name}: {error}") from error
        return rows.to_record(row, self.media_root, id=name)


def _is_image(feature):
    return isinstance(getattr(feature, "feature", feature), tfds.features.Image)


def _plain(value):
    """Returns the value of a feature in Python's own types; a path has no NUL byte, a file has."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes) and b"\0" not in value:
        return value.decode()
    return value
