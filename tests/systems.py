"""Twelve systems of a few thousand weights each: which views, which tower, connector and format.

Widths and views are small; what a system has of each kind is what the original has.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlmjax import build
from vlmjax.data.processor import Processor, ProcessorConfig
from vlmjax.data.templates import TEMPLATES
from vlmjax.data.tokenizer import SPECIAL_TOKENS, byte_tokenizer

CONTROLS = {c for t in TEMPLATES.values() for c in t.controls} | {*SPECIAL_TOKENS}
CONTROLS |= {"<img>", "</img>", "<image>", "</image>", "<slice>", "</slice>"}
LLM = dict(vocab=0, width=32, mlp=48, layers=2, heads=4, kv_heads=2, head_dim=8)
SIGLIP = dict(width=24, mlp=32, layers=2, heads=2, patch=7, position="table", side=4)
CLIP = SIGLIP | dict(prefix=1, embed_norm=True, patch_bias=False, features="-1", eps=1e-5)
EVA = CLIP | dict(order="post", features="last", final_norm=False)
NEWLINES = (("layout", "tiles"), ("unpad", "original"), ("newline", "row"))
BOI_EOI = (("vectors", ("boi", "eoi")), ("positions", "shared"))


def square(mode="pad", side=28):
    return ({"name": "square", "side": side, "mode": mode},)


def anyres(*pinpoints):
    return ({"name": "anyres", "side": 28, "pinpoints": pinpoints},)


class System(NamedTuple):
    """The `model` section without what all share, the processor's template and `picture`."""

    model: dict
    template: str
    picture: dict
    video: bool = False


SYSTEMS = {
    "llava_1_5": System(dict(vision=CLIP), "vicuna", dict(strategy=square())),
    "llava_next": System(
        dict(vision=CLIP, connector=dict(specials=("newline",))),
        "vicuna",
        dict(
            strategy=anyres((28, 56), (56, 28), (56, 56)),
            frame=square(),
            format=NEWLINES,
            frame_format=(("layout", "frames"),),
        ),
        video=True,
    ),
    "llava_onevision": System(
        dict(vision=SIGLIP, connector=dict(specials=("newline",)), pool="weighted"),
        "qwen",
        dict(
            strategy=anyres(*((28 * i, 28 * j) for i in range(1, 5) for j in range(1, 5))),
            frame=square(),
            format=(*NEWLINES, ("max_tiles", 2)),
            frame_format=(("layout", "frames"), ("pool", "bilinear"), ("newline", "end")),
        ),
        video=True,
    ),
    "360vl": System(
        dict(
            vision=CLIP,
            connector=dict(
                type="c_abstractor", queries=4, width=16, depth=2, side=4, copies=("ctt", "ori")
            ),
            sources=(0, 0),
        ),
        "llama3",
        dict(strategy=({"name": "grid2x2", "side": 28},), stitch="tiles"),
    ),
    "internvl": System(
        dict(
            vision=CLIP | dict(features="last", final_norm=False, layer_scale=0.1),
            connector=dict(window=2, norm="layer"),
        ),
        "chatml",
        dict(
            strategy=({"name": "dynamic", "side": 28, "max_tiles": 4},),
            format=(("control", ("<img>", "</img>")),),
        ),
    ),
    "minicpm": System(
        dict(
            vision=SIGLIP | dict(position="bucket", side=8),
            connector=dict(type="resampler", queries=4, heads=4),
        ),
        "minicpm",
        dict(
            strategy=({"name": "uhd", "side": 28, "patch": 7, "max_slices": 4},),
            format=(("layout", "slices"), ("between", "\n")),
        ),
    ),
    "vila": System(
        dict(vision=SIGLIP | dict(features="-1"), connector=dict(window=2, norm="layer")),
        "vicuna",
        dict(strategy=square("resize"), frame_format=(("between", "\n"),)),
        video=True,
    ),
    "s2": System(
        dict(
            vision=SIGLIP | dict(features="-1"),
            connector=dict(window=2, norm="layer", reduce="weighted"),
            sources=(0, 0),
        ),
        "vicuna",
        dict(
            strategy=({"name": "s2", "side": 28, "scales": (28, 56)},),
            stitch="tiles",
            resample=((), ("area", (4, 4))),
        ),
    ),
    "cogvlm2": System(
        dict(
            vision=EVA,
            connector=dict(type="conv_glu", hidden=40),
            llm=dict(expert="visual"),
        ),
        "cogvlm",
        dict(strategy=square("resize"), format=BOI_EOI),
    ),
    "glm4v": System(
        dict(
            vision=EVA,
            connector=dict(type="conv_glu", hidden=40, conv="out", scaling=8.0),
            llm=dict(rotary=4),
        ),
        "glm4",
        dict(strategy=square("resize"), format=BOI_EOI),
    ),
    "internvl_1_0": System(
        dict(
            vision=CLIP,
            connector=dict(type="qformer", queries=4, width=16, mlp=24, layers=2, heads=2),
        ),
        "vicuna",
        dict(strategy=square()),
    ),
    "cambrian": System(
        dict(
            vision=(
                SIGLIP | dict(side=5),
                CLIP,
                dict(
                    type="convnext",
                    widths=(8, 12),
                    depths=(1, 1),
                    rows=16,
                    columns=16,
                    grid=8,
                    layer_scale=1.0,
                ),
            ),
            connector=dict(
                type="sva",
                side=4,
                windows=(1, 1, 2),
                width=16,
                heads=2,
                layers=2,
                reduce="weighted",
            ),
            llm=dict(layers=3, extra_num=2, extra_start=0, extra_stride=2),
        ),
        "llama3",
        dict(
            strategy=(*square(side=35), *square(), *square(side=64)),
            resample=(("bilinear", (4, 4)), (), ()),
            format=(("layout", "square"), ("unpad", "original"), ("newline", "row")),
        ),
    ),
}


@functools.cache
def tokenizer():
    return byte_tokenizer(sorted(CONTROLS))


def make(name, **compute):
    """Returns (`VLMConfig`, `Processor`) of a system."""
    system = SYSTEMS[name]
    llm = LLM | dict(vocab=tokenizer().size) | system.model.get("llm", {})
    cfg = build.model_config({"compute": compute, **system.model, "llm": llm})
    config = ProcessorConfig(template=system.template, picture=system.picture, max_length=4096)
    return cfg, Processor(config, tokenizer(), cfg.form)


def picture(rng, width, height):
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def messages(*content, answer="a cat"):
    """Returns a conversation about pictures, or an array of frames, and its answer."""
    parts = [
        {"type": "video", "video": c, "timestamps": list(range(len(c)))}
        if isinstance(c, np.ndarray)
        else {"type": "image", "image": c}
        for c in content
    ]
    said = [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]
    return said + [{"role": "assistant", "content": answer}] * bool(answer)


def samples(name, process):
    """Returns samples of a picture, two pictures, no picture and, where it has them, frames."""
    rng = np.random.default_rng(0)
    shown = [(picture(rng, 60, 40),), (picture(rng, 30, 90), picture(rng, 50, 50)), ()]
    if SYSTEMS[name].video:
        shown.append((rng.integers(0, 255, (3, 40, 60, 3), dtype=np.uint8),))
    return [process({"id": f"{i}", "messages": messages(*x)}) for i, x in enumerate(shown)]
