"""The twelve tiny systems and some more, with random weights, as `Chat`s that can be exported."""

import jax
import numpy as np
from systems import CLIP, LLM, SIGLIP, SYSTEMS, System, anyres, square, tokenizer

from vlmjax import build
from vlmjax.data.processor import Processor, ProcessorConfig
from vlmjax.generate.chat import Chat
from vlmjax.nn import unflatten

SCALED = dict(
    rotary=4,
    rope_scale=2.0,
    rope_factors="long",
    rope_long=(1.5, 3.0),
    rope_attention=1.1,
    embed_multiplier=3.0,
    attention_multiplier=0.3,
    residual_multiplier=0.5,
    logits_divisor=2.0,
    qk_norm="head",
    o_bias=True,
    mlp_bias=True,
)
ROWS = (("layout", "tiles"), ("unpad", "original"), ("newline", "row"))
NEXT = dict(type="convnext", widths=(8, 12), depths=(1, 1), rows=16, columns=16, grid=8)
PERCEIVER = dict(queries=3, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=20, mlp=28)
ABSTRACTOR = dict(queries=4, width=16, depth=2, side=3, eos=1, norm="layer", copies=("ctt", "ori"))

# What the twelve leave out: other fields of towers, connectors and decoders, maximum pooling.
MORE = {
    "scaled": System(
        dict(
            vision=SIGLIP,
            connector=dict(specials=("newline",)),
            llm=SCALED,
            pool="max",
        ),
        "llava_chatml",
        dict(strategy=anyres((28, 56), (56, 56)), format=(*ROWS, ("pool", "max"))),
    ),
    "abstractor": System(
        dict(vision=CLIP, connector=dict(type="c_abstractor", **ABSTRACTOR), sources=(0, 0)),
        "llama3",
        dict(strategy=({"name": "grid2x2", "side": 28},), stitch="tiles"),
    ),
    "minicpm_2_0": System(
        dict(
            vision=SIGLIP | dict(position="bicubic_antialias", prefix=3, qk_norm=True, norm="rms"),
            connector=dict(type="resampler", queries=4, heads=4, query_pos="sincos"),
            llm=dict(embed_multiplier=12.0, logits_divisor=9.0, residual_multiplier=0.3),
        ),
        "minicpm",
        dict(
            strategy=({"name": "uhd", "side": 28, "patch": 7, "max_slices": 4},),
            format=(("layout", "slices"), ("between", "\n")),
        ),
    ),
    "perceiver": System(
        dict(
            vision=SIGLIP | dict(position="bicubic", act="gelu", gated=True),
            connector=dict(type="perceiver", **PERCEIVER),
        ),
        "mistral",
        dict(strategy=square("resize", 35)),
    ),
    "sva_in_layers": System(
        dict(
            vision=(SIGLIP | dict(side=5), CLIP, NEXT),
            connector=dict(type="sva", side=4, windows=(1, 1, 2), width=16, heads=2, layers=2)
            | dict(reduce="weighted"),
            llm=dict(layers=3, extra_num=2, extra_stride=2, extra_place="attention"),
        ),
        "llama3",
        dict(
            strategy=(*square(side=35), *square(), *square(side=64)),
            resample=(("bilinear", (4, 4)), (), ()),
            format=(("layout", "square"), ("unpad", "original"), ("newline", "row")),
        ),
    ),
    "videollama3": System(
        dict(vision=dict(width=24, mlp=32, layers=2, heads=2, patch=7)), "chatml", None
    ),
}
ALL = SYSTEMS | MORE


def make_chat(name, seed=0):
    """Returns the `Chat` of a system, every parameter of it random."""
    system = ALL[name]
    llm = LLM | dict(vocab=tokenizer().size, tie=name == "scaled") | system.model.get("llm", {})
    config = build.model_config(system.model | dict(llm=llm))
    settings = dict(template=system.template, picture=system.picture, max_length=4096)
    if system.picture is None:
        settings |= dict(patch=7, min_visual_tokens=1, max_visual_tokens=60)
    processor = Processor(ProcessorConfig(**settings), tokenizer(), config.form)
    return Chat(config, random_params(config, seed), processor)


def random_params(config, seed):
    """Returns params, also of scales, biases and tables, that no initialiser gives."""
    rng = np.random.default_rng(seed)

    def draw(path, p):
        noise = 0.2 * rng.standard_normal(p.shape).astype(np.float32)
        ones = path.endswith("/scale") or path.endswith("/bias")
        return p + noise if ones else p * (1 + noise)

    drawn = jax.tree.map(np.asarray, build.random_params(config, seed))
    return unflatten({path: draw(path, p).astype(np.float32) for path, p in drawn.items()})
