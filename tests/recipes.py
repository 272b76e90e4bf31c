"""Every size and stage of the recipes of `configs/` that see pictures by a strategy."""

import importlib
import itertools


def _all(**values):
    return [
        ",".join(f"{k}={v}" for k, v in zip(values, chosen, strict=True))
        for chosen in itertools.product(*values.values())
    ]


QWEN = [f"qwen1_5_{n}" for n in ("0_5b", "1_8b", "4b", "7b", "14b", "32b", "72b", "110b")]
NEXT = ["vicuna_7b", "vicuna_13b", "mistral_7b", "hermes_yi_34b", "llama3_8b", *QWEN]
# Config -> arguments, the stages of a size one after another.
RECIPES = {
    "qihoo_360vl": _all(size=("8b", "70b"), stage=(1, 2)),
    "llava_1_5": _all(size=("7b", "13b"), stage=(1, 2)),
    "llava_next": _all(size=NEXT, stage=(1, 2))
    + _all(size=["so400m_qwen1_5_0_5b"], max_tiles=(4, 9, 16), stage=(1, 2)),
    "llava_next_video": _all(size=("7b", "34b"), stage=(1,)),
    "llava_next_interleave": _all(size=("0.5b", "7b", "14b"), stage=(1, 2, 3)),
    "internvl_1_0": _all(
        variant=("mlp_336", "mlp_448", "qllama"), size=("7b", "13b"), stage=(1, 2)
    ),
    "internvl_1_5": _all(version=("1.5",), size=("26b", "40b", "2b", "4b"), stage=(1, 2))
    + _all(version=("1.1",), size=("19b",), stage=(1, 2))
    + _all(version=("1.2",), size=("40b",), stage=(1, 2)),
    "minicpm_v": _all(version=("2.0", "2.5"), stage=(1, 2)),
    "vila_1_5": _all(size=("3b", "3b_s2", "8b", "13b", "40b"), stage=(1, 2, 3)),
    "cogvlm2": _all(stage=(1, 2)),
    "glm_4v": _all(stage=(1, 2)),
    "cambrian_1": _all(size=("8b", "13b", "34b"), stage=(1, 2)),
}
ALL = [(name, arg) for name, args in RECIPES.items() for arg in args]
# Of each system the sizes that are made of other parts: all stages of a tiny variant.
TINY = {
    "qihoo_360vl": [""],
    "llava_1_5": [""],
    "llava_next": ["", "size=so400m_qwen1_5_0_5b,max_tiles=9"],
    "llava_next_video": [""],
    "llava_next_interleave": [""],
    "internvl_1_0": ["variant=mlp_336", "variant=qllama"],
    "internvl_1_5": ["", "version=1.2,size=40b", "size=4b"],
    "minicpm_v": ["version=2.0", "version=2.5"],
    "vila_1_5": ["", "size=3b_s2", "size=40b"],
    "cogvlm2": [""],
    "glm_4v": [""],
    "cambrian_1": [""],
}


def config(name, *args):
    """Returns the ConfigDict of a recipe."""
    arg = ",".join(filter(None, args))
    return importlib.import_module(f"configs.{name}").get_config(arg)


def stages(name):
    """Returns the stages of a recipe."""
    found = {int(arg.rpartition("stage=")[2]) for arg in RECIPES[name]}
    return sorted(found)
