"""Simulated cycles of the TPU attention kernels stay where they are (jax 0.10.2, libtpu 0.0.51)."""

import pytest
from benchmarks.attention_cycles import SHORT, SLOTS, report

# (chip, case, block, kernel, slots): (cycles when last improved, most milliseconds allowed)
BASELINES = {
    ("v5e", "vision", 256, "forward", SLOTS): (464_200, 0.60),
    ("v5e", "vision", 256, "backward", SLOTS): (803_000, 1.00),
    # A quarter of an eighth of splash, which takes 5.86 ms for a row.
    ("v5e", "decoder", 256, "forward", SHORT): (243_800, 0.73 / 4),
}


LONG = ("v5e", "vision", 256, "backward", SLOTS)  # a minute


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [pytest.param(w, marks=pytest.mark.long) if w == LONG else w for w in BASELINES],
    ids=str,
)
def test_cycles_do_not_grow(what):
    cycles, milliseconds = BASELINES[what]
    line = report(*what)
    assert line["cycles"] < 1.03 * cycles and line["ms"] <= milliseconds
    assert line["at_peak"] < 1  # the list of block pairs was not empty
