"""Safetensors directories, read lazily and written tensor by tensor.

The format is 8 bytes of little-endian header length, a JSON header `{name: {"dtype", "shape",
"data_offsets"}}` and the raw bytes. Both directions are written out here because the `safetensors`
package wants every tensor of a file in memory before it writes, and because bf16 has to come back
as `ml_dtypes.bfloat16`. Reading is a memory map: a tensor costs memory only when it is touched."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_SIZE = 5_000_000_000
MAX_HEADER_SIZE = 100_000_000  # the limit of the safetensors package
HEADER_BYTES_PER_TENSOR = 256  # generous: a name, a dtype, a shape, two offsets
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OPEN_CLIP = "open_clip_model.safetensors"
# VILA keeps each part in a directory of its own.
FOLDERS = ("llm", "vision_tower", "mm_projector")
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: its file, dtype name, shape and byte range in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorDirectory:
    """The tensors of a directory with `model.safetensors`, or shards and their index, by name.

    Where there are `FOLDERS` instead, a name begins with that of its folder and a dot.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        self._maps = {}
        self._stored = {}
        for prefix, file, names in _all_weight_files(self.directory):
            header = read_header(file)
            lost = sorted(names - header.keys()) if names is not None else []
            if lost:
                raise ValueError(
                    f"{file} lacks {len(lost)} tensors that {INDEX} puts there: {', '.join(lost)}; "
                    "the index and the shards must come from one export; copy the directory again"
                )
            self._stored |= {prefix + name: stored for name, stored in header.items()}

    def __contains__(self, name):
        return name in self._stored

    def __iter__(self):
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> np.dtype:
        stored = self._stored[name]
        if stored.dtype not in DTYPES:
            raise ValueError(
                f"{name} in {stored.file} is stored as {stored.dtype}; weights may be "
                f"{', '.join(DTYPES)}; "
                "save the model in one of these, without quantisation"
            )
        return DTYPES[stored.dtype]

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file: copy what has to outlive the file."""
        stored = self._stored[name]
        if stored.file not in self._maps:
            self._maps[stored.file] = np.memmap(stored.file, np.uint8, mode="r")
        raw = self._maps[stored.file][stored.start : stored.stop]
        return raw.view(np.ndarray).view(self.dtype(name)).reshape(stored.shape)


def read_header(file: Path) -> dict[str, Stored]:
    """Every tensor that one safetensors file declares, each checked to lie inside the file."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_SIZE):
            raise ValueError(
                f"{file} declares a header of {length} bytes in a file of {size}; a safetensors "
                "header ends inside its file; "
                "the file is truncated or of another format: copy it again"
            )
        header = json.loads(f.read(length))
    stored = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = tuple(entry["shape"])
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        dtype = DTYPES.get(entry["dtype"])
        wrong_size = dtype is not None and stop - start != math.prod(shape) * dtype.itemsize
        if not 8 + length <= start <= stop <= size or wrong_size:
            raise ValueError(
                f"{name} in {file} spans bytes {start} to {stop} of {size} for "
                f"{entry['dtype']}{list(shape)}; a tensor lies "
                "inside its file and has the size of its shape; the file is truncated: copy it "
                "again"
            )
        stored[name] = Stored(file, entry["dtype"], shape, start, stop)
    return stored


def _all_weight_files(directory: Path) -> list[tuple[str, Path, set[str] | None]]:
    """(prefix of the names, file, its names where an index tells them) of a directory."""
    whole = any((directory / name).is_file() for name in (SINGLE, INDEX, OPEN_CLIP))
    folders = {f"{name}.": directory / name for name in FOLDERS}
    if whole or not all(folder.is_dir() for folder in folders.values()):
        folders = {"": directory}
    return [
        (prefix, file, names)
        for prefix, folder in folders.items()
        for file, names in _weight_files(folder).items()
    ]


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a directory, with the names that an index puts into each."""
    for single in (SINGLE, OPEN_CLIP):
        if (directory / single).is_file():
            return {directory / single: None}
    if not (directory / INDEX).is_file():
        found = (
            sorted(p.name for p in directory.iterdir())
            if directory.is_dir()
            else "no such directory"
        )
        raise ValueError(
            f"{directory} holds {found}; weights are read from {SINGLE} or {INDEX} only, never "
            "from pickles; point to a safetensors checkpoint or convert it with transformers"
        )
    files = {}
    for name, file in json.loads((directory / INDEX).read_text())["weight_map"].items():
        files.setdefault(file, set()).add(name)
    bad = sorted(f for f in files if Path(f).name != f or not (directory / f).is_file())
    if bad:
        raise ValueError(
            f"{directory / INDEX} names {', '.join(bad)}; every shard is a file of that directory; "
            "download the missing shards"
        )
    return {directory / file: names for file, names in files.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: what the header needs, and a function that makes the values."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.size * self.dtype.itemsize


def write_tensors(
    directory, tensors: Iterable[Tensor], max_shard_size: int = MAX_SHARD_SIZE
) -> list[Path]:
    """Writes one file, or shards below `max_shard_size` bytes and their index; holds one tensor at
    a time.

    Files appear under their final names only when all are complete; weight files of an earlier
    export are then removed.

    Returns:
      The safetensors files. A tensor larger than the limit gets a shard of its own.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = split_shards(tensors, max_shard_size)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / f"{name}.tmp", shard)
    for stale in directory.iterdir():
        if WEIGHT_FILE.fullmatch(stale.name):
            stale.unlink()
    for name in names:
        os.replace(directory / f"{name}.tmp", directory / name)
    if len(shards) > 1:
        everything = [t for shard in shards for t in shard]
        index = {
            "metadata": {
                "total_parameters": sum(t.size for t in everything),
                "total_size": sum(t.nbytes for t in everything),
            },
            "weight_map": {
                t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
            },
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [directory / name for name in names]


def split_shards(tensors: Iterable[Tensor], max_shard_size: int) -> list[list[Tensor]]:
    """Runs of tensors, each below the limit; wider dtypes first, so that all are aligned."""
    shards, room = [[]], max_shard_size
    for tensor in sorted(tensors, key=lambda t: -t.dtype.itemsize):
        cost = tensor.nbytes + HEADER_BYTES_PER_TENSOR
        if cost > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(tensor)
        room -= cost
    return shards


def _write_file(path: Path, tensors: list[Tensor]):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for t in tensors:
        span = [offset, offset + t.nbytes]
        header[t.name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": span}
        offset += t.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as f:
        f.write(len(encoded).to_bytes(8, "little") + encoded)
        for t in tensors:
            values = t.make()
            assert (values.shape, values.dtype) == (t.shape, t.dtype), t.name
            f.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
