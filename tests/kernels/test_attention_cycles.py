"""Simulated cycles of the TPU attention kernels stay where they are (jax 0.10.2, libtpu 0.0.51)."""

import pytest
from benchmarks.attention_cycles import report

# (chip, case, block, kernel): (cycles when last improved, most milliseconds allowed)
BASELINES = {
    ("v5e", "vision", 256, "forward"): (464_200, 0.60),
    ("v5e", "vision", 256, "backward"): (803_000, 1.00),
    ("v5p", "vision", 256, "forward"): (239_100, 0.15),
    ("v5p", "vision", 256, "backward"): (405_900, 0.26),
    ("v5e", "decoder", 512, "forward"): (1_062_400, 0.73),  # an eighth of splash, 5.86 ms
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BASELINES, ids=str)
def test_cycles_do_not_grow(what):
    cycles, milliseconds = BASELINES[what]
    line = report(*what)
    assert line["cycles"] < 1.03 * cycles and line["ms"] <= milliseconds
    assert line["at_peak"] < 1  # the list of block pairs was not empty
