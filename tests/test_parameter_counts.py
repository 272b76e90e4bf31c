"""Parameters of whole systems, counted without allocating any, against the official numbers."""

import pytest
from recipes import config

from vlmjax import build

# Config, argument -> official number of the whole system, what of it is no parameter here.
EXACT = {
    # 39,006,214,656 bytes in bf16, in which the 64 frequencies of each of 32 layers are counted.
    ("cogvlm2", ""): (39_006_214_656 // 2, 32 * 64),
    # 6,869,931,584 bytes in bf16, with the fixed positions of the 64 queries.
    ("minicpm_v", "version=2.0"): (6_869_931_584 // 2, 64 * 2304),
}


def modules(name, arg):
    """Returns {module: number of parameters}."""
    _, shapes, _ = build.abstract(build.resolve(config(name, arg)).model)
    counts = {}
    for path, x in shapes.items():
        module = path.split("/")[0]
        counts[module] = counts.get(module, 0) + x.size
    return counts


@pytest.mark.parametrize(("name", "arg"), EXACT)
def test_total_is_exact(name, arg):
    official, fixed = EXACT[name, arg]
    assert sum(modules(name, arg).values()) == official - fixed


# Config, argument, module -> official number in millions as published, and its last digit.
ROUNDED = {
    ("internvl_1_5", "size=26b", "vision"): (5536.5, 0.1),  # 5.5365B, "5.54B"
    ("internvl_1_5", "size=2b", "vision"): (304.01, 0.01),
    ("internvl_1_5", "size=26b", "connector"): (116.43, 0.01),
    ("internvl_1_5", "size=40b", "connector"): (143.17, 0.01),
    ("internvl_1_5", "size=2b", "connector"): (12.60, 0.01),
    ("internvl_1_5", "size=4b", "connector"): (22.03, 0.01),
    ("internvl_1_0", "variant=mlp_448", "vision"): (5903.0, 1.0),  # 5.903B by its formula
    ("llava_next", "size=vicuna_7b", "connector"): (21, 1),
    ("llava_next", "size=vicuna_13b", "connector"): (31.5, 0.1),
    ("llava_next", "size=hermes_yi_34b", "connector"): (58.7, 0.1),
    ("cambrian_1", "size=8b", "vision_4"): (843.4, 0.1),
}


@pytest.mark.parametrize(("name", "arg", "module"), ROUNDED)
def test_modules_have_the_published_size(name, arg, module):
    official, digit = ROUNDED[name, arg, module]
    assert abs(modules(name, arg)[module] / 1e6 - official) <= digit


def test_connectors_of_whole_systems():
    assert modules("minicpm_v", "version=2.5")["connector"] == 89_038_848
    # Two C-Abstractors; the official number counts the position of a class token too.
    assert modules("qihoo_360vl", "")["connector"] == 2 * (37_399_040 - 1024)


def test_llava_of_the_ablations_has_7_06_billion():
    """The tower here ends at the layer whose features are taken: a block and a norm less."""
    counts = modules("llava_next", "size=vicuna_7b")
    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert round((sum(counts.values()) + block + 2 * 1024) / 1e9, 2) == 7.06


def test_cambrians_connector_and_blocks():
    """Three layers of 47,296,512 with the positions of 4x4 windows; ten blocks of 22,056,960."""
    _, shapes, _ = build.abstract(build.resolve(config("cambrian_1", "")).model)

    def count(prefix):
        return sum(x.size for path, x in shapes.items() if path.startswith(prefix))

    assert count("connector/blocks/") == 47_296_512
    assert count("llm/extra/") == 10 * 22_056_960


def test_experts_of_cogvlm2():
    """6.98 billion, in a decoder that has the language weights too."""
    _, shapes, _ = build.abstract(build.resolve(config("cogvlm2", "")).model)
    experts = sum(x.size for path, x in shapes.items() if "/expert/" in path)
    assert round(experts / 1e9, 2) == 6.98
