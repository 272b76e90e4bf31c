"""Where each parameter lies in a checkpoint, as rows of a table that is read in both directions.

A row is (path in our tree, key in the checkpoint, axes there -> axes here). Axes are letters whose
sizes the reader of the table gives, those of `nn.py`; a group in brackets is one dimension:

    ("blocks/attn/q/kernel", "layers.{}.q_proj.weight", "(N H) D -> D N H")

says that the torch weight [N*H, D] is our kernel [D, N, H]. `1` is a dimension of size 1. A key
with `{}` occurs once per layer; our leaf then stacks them along a leading axis of layers.

A key that holds several leaves, one after the other along an axis, has that axis written as a sum
in which square brackets mark the part of the row. A fused projection, [q heads, k heads, v heads]:

    ("blocks/attn/q/kernel", "layers.{}.qkv_proj.weight", "([N]+K+K H) D -> D N H")
    ("blocks/attn/k/kernel", "layers.{}.qkv_proj.weight", "(N+[K]+K H) D -> D K H")
    ("blocks/attn/v/kernel", "layers.{}.qkv_proj.weight", "(N+K+[K] H) D -> D K H")

The sum may be anywhere: `(K [G]+1+1 H) D -> D (K G) H` takes the first G of the G + 2 heads that
lie together for each of K groups. Every part of such a key needs its row.

`H~` is an axis of which the first R entries are interleaved pairs there (0 1 0 1 ...) and two
halves here (0 0 ... 1 1 ...): what a rotary position embedding of the interleaved form rotates, in
the order of ours.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from vlmjax.nn import flatten, unflatten


@dataclass(frozen=True)
class Row:
    """One of our leaves: its path, the checkpoint keys that hold it, and both shapes."""

    path: str
    keys: tuple[str, ...]
    stacked: bool
    axes: str
    sizes: Mapping[str, int]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of each key, with all its parts."""
        return _shape(self.axes.split("->")[0], self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our leaf."""
        return (len(self.keys),) * self.stacked + _shape(self.axes.split("->")[1], self.sizes)

    @property
    def part(self) -> tuple[int, int]:
        """(first entry, entries) of this row along the axis of its keys that is a sum.

        (0, 0) when no axis is a sum.
        """
        return next(
            ((p.start, p.stop - p.start) for p in self._index() if p != slice(None)), (0, 0)
        )

    def load(self, stored: np.ndarray) -> np.ndarray:
        """Our leaf, of one layer if it is stacked."""
        source, target = self.axes.split("->")
        part = stored.reshape(self._split())[self._index()]
        for at, axis in enumerate(_axes(source)):
            if axis.endswith("~"):
                part = part.take(self._halves(axis), at)
        order, shape = _order(source, target), _shape(target, self.sizes)
        return part.reshape(self._part_shape(drop=True)).transpose(order).reshape(shape)

    def put(self, ours: np.ndarray, stored: np.ndarray):
        """Writes our leaf into `stored`, a contiguous array of `stored_shape`."""
        source, target = self.axes.split("->")
        order = _order(source, target)
        shape = self._part_shape(drop=True)
        part = ours.reshape([shape[i] for i in order]).transpose(np.argsort(order))
        part = part.reshape(self._part_shape())
        for at, axis in enumerate(_axes(source)):
            if axis.endswith("~"):
                part = part.take(np.argsort(self._halves(axis)), at)
        stored.reshape(self._split())[self._index()] = part

    def _split(self):
        """The shape of a key with every axis of its own."""
        return [_size(axis, self.sizes) for axis in _axes(self.axes.split("->")[0])]

    def _index(self):
        """What of an array of that shape is of this row."""
        return tuple(_part(axis, self.sizes) for axis in _axes(self.axes.split("->")[0]))

    def _part_shape(self, drop=False):
        axes = _names(self.axes.split("->")[0])
        return [_size(axis, self.sizes) for axis in axes if not (drop and axis == "1")]

    def _halves(self, axis):
        """[0 2 4 ... 1 3 5 ... R R+1 ...]"""
        size, turned = _size(axis, self.sizes), self.sizes["R"]
        pairs = np.arange(turned).reshape(-1, 2).T.reshape(-1)
        return np.concatenate([pairs, np.arange(turned, size)])


def make_rows(
    table: Iterable[tuple[str, str, str]],
    sizes: Mapping[str, int],
    layers: int = 0,
    path: str = "",
    key: str = "",
) -> list[Row]:
    """The rows of one table.

    Args:
      sizes: of the axis letters.
      layers: that `{}` in a key counts.
      path: prefix of our paths.
      key: prefix of the keys.
    """
    rows = []
    for our_path, their_key, axes in table:
        stacked = "{}" in their_key
        keys = tuple(key + their_key.format(i) for i in range(layers if stacked else 1))
        rows.append(Row(path + our_path, keys, stacked, axes, sizes))
    return rows


def by_key(rows: Iterable[Row]) -> dict[str, list[tuple[Row, int]]]:
    """{key: the rows it holds and the layer of each}, in order; several for a fused key.

    Raises:
      ValueError: the rows of a key are not all its parts, each once.
    """
    found = {}
    for row in rows:
        for layer, key in enumerate(row.keys):
            found.setdefault(key, []).append((row, layer))
    for key, parts in found.items():
        want = _pieces(parts[0][0])
        have = sorted(row.part for row, _ in parts)
        if have != want or len({row.stored_shape for row, _ in parts}) > 1:
            raise ValueError(
                f"key {key} consists of (first, entries) {want} and its rows "
                f"({', '.join(row.path for row, _ in parts)}) are {have}; every part needs exactly "
                "one row, and all must agree on the shape; correct the table"
            )
    return found


def load(table: Iterable[Row], tensors: Mapping[str, np.ndarray]) -> dict:
    """The parameters of a table from tensors by key: a nested dict of arrays.

    A row without a path is a part of a key that we do not have; `store` writes zeros there.
    """
    leaves = {}
    for row in table:
        if row.path:
            layers = [row.load(tensors[key]) for key in row.keys]
            leaves[row.path] = np.stack(layers) if row.stacked else layers[0]
    return unflatten(leaves)


def store(table: Iterable[Row], params: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `load`: tensors by key."""
    leaves, tensors = flatten(params), {}
    for key, parts in by_key(table).items():
        dtype = next(leaves[row.path].dtype for row, _ in parts if row.path)
        tensors[key] = np.zeros(parts[0][0].stored_shape, dtype)
        for row, layer in parts:
            if row.path:
                leaf = np.asarray(leaves[row.path])
                row.put(leaf[layer] if row.stacked else leaf, tensors[key])
    return tensors


def _pieces(row: Row) -> list[tuple[int, int]]:
    """All (first, entries) of the sum in the keys of a row."""
    for axis in _axes(row.axes.split("->")[0]):
        if "+" in axis:
            sizes = [_size(term, row.sizes) for term in axis.split("+")]
            return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    return [(0, 0)]


def _groups(axes: str) -> list[list[str]]:
    """`(N H) D` -> [[N, H], [D]]."""
    return [(group or single).split() for group, single in re.findall(r"\(([^)]*)\)|(\S+)", axes)]


def _axes(axes: str) -> list[str]:
    return [axis for group in _groups(axes) for axis in group]


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    names = re.sub(r"[\[\]~]", "", axis).split("+")
    return sum(1 if name == "1" else sizes[name] for name in names)


def _shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(_size(a, sizes) for a in group) for group in _groups(axes))


def _part(axis: str, sizes: Mapping[str, int]) -> slice:
    """What of an axis is of a row: all of it, or the marked term of a sum."""
    if "+" not in axis:
        return slice(None)
    terms = axis.split("+")
    at = next(i for i, term in enumerate(terms) if term.startswith("["))
    start = sum(_size(term, sizes) for term in terms[:at])
    return slice(start, start + _size(terms[at], sizes))


def _names(axes: str) -> list[str]:
    """Axis letters of what a row has of its key: `(N+[K]+K H~) D` -> [K, H, D]."""
    marked = [re.search(r"\[(.*?)\]", axis) for axis in _axes(axes)]
    return [m[1] if m else a.rstrip("~") for m, a in zip(marked, _axes(axes), strict=True)]


def _order(source: str, target: str) -> list[int]:
    """Where each axis of the target is in the source; axes of size 1 do not count."""
    before, after = ([a for a in _names(x) if a != "1"] for x in (source, target))
    return [before.index(a) for a in after]
