"""Rows of key tables: what is read is written back, part by part."""

import numpy as np
import pytest

from vlmjax.hf.table import by_key, make_rows

SIZES = dict(N=6, K=2, G=3, H=8, R=4, D=5, M=7)
FUSED = {
    "qkv": ("([N]+K+K H) D -> D N H", "(N+[K]+K H) D -> D K H", "(N+K+[K] H) D -> D K H"),
    "grouped": (
        "(K [G]+1+1 H) D -> D (K G) H",
        "(K G+[1]+1 H) D -> D K H",
        "(K G+1+[1] H) D -> D K H",
    ),
    "gate and up": ("([M]+M) D -> D M", "(M+[M]) D -> D M"),
    "one": ("(N H~) D -> D N H",),
    "class token": ("1 1 D -> D",),
}


def _rows(axes):
    return make_rows([(f"leaf_{i}", "layers.{}.w", a) for i, a in enumerate(axes)], SIZES, 2)


@pytest.mark.parametrize("name", FUSED)
def test_parts_of_a_key_in_and_out(name):
    for parts in by_key(_rows(FUSED[name])).values():
        shape = parts[0][0].stored_shape
        stored = np.random.default_rng(0).random(shape)
        again = np.full(shape, np.nan)
        for row, _ in parts:
            ours = row.load(stored)
            assert row.shape == (2, *ours.shape)
            row.put(ours, again)
        assert np.array_equal(again, stored)


def test_what_is_where():
    rows = np.arange(6 * 8)[:, None] * np.ones(5)
    (one,) = _rows(FUSED["one"])
    assert one.load(rows)[0, 1].tolist() == [8, 10, 9, 11, 12, 13, 14, 15]
    grouped = [
        row.load(np.arange(80)[:, None] * np.ones(5))[0, :, 0] for row in _rows(FUSED["grouped"])
    ]
    assert [heads.tolist() for heads in grouped] == [[0, 8, 16, 40, 48, 56], [24, 64], [32, 72]]


def test_a_part_without_row_is_an_error():
    with pytest.raises(ValueError, match=r"consists of .* \[\(0, 7\), \(7, 7\)\]"):
        by_key(_rows(FUSED["gate and up"][:1]))
    with pytest.raises(ValueError, match="every part needs exactly one row"):
        by_key(_rows(FUSED["class token"] * 2))
