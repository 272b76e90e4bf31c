"""Tiny models of the systems that transformers has no class for, and of those it has."""

import jax
import numpy as np

from vlmjax import build
from vlmjax.data.processor import Processor, ProcessorConfig
from vlmjax.data.templates import TEMPLATES
from vlmjax.data.tokenizer import byte_tokenizer
from vlmjax.generate.chat import Chat
from vlmjax.nn import unflatten

MARKS = ("<img>", "</img>", "<image>", "</image>", "<slice>", "</slice>")
PADS = ("<|image_pad|>", "<|video_pad|>", "<|endoftext|>")
CONTROLS = {token for template in TEMPLATES.values() for token in template.controls}
TOKENIZER = byte_tokenizer(sorted({*CONTROLS, *MARKS, *PADS}))

LLM = dict(vocab=TOKENIZER.size, width=32, mlp=48, layers=4, heads=4, kv_heads=2, head_dim=8)
LLM |= dict(tie=False)
CLIP = dict(
    width=24, mlp=32, layers=3, heads=2, patch=7, act="quick_gelu", eps=1e-5, patch_bias=False,
    embed_norm=True, prefix=1, position="table", side=4, features="-2",
)  # fmt: skip
SIG = dict(width=24, mlp=32, layers=3, heads=2, patch=7, position="table", side=4)
INTERN = dict(CLIP, features="last", final_norm=False, layer_scale=0.1)
EVA = dict(CLIP, order="post", features="last", final_norm=False)
NEXT = dict(type="convnext", widths=(8, 12), depths=(1, 1), rows=16, columns=16, grid=8, patch=4)
SCALED = dict(
    rotary=4, rope_scale=2.0, rope_factors="long", rope_long=(1.5, 3.0), rope_attention=1.1,
    embed_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.5, logits_divisor=2.0,
    qk_norm="head", o_bias=True, mlp_bias=True, tie=True,
)  # fmt: skip
MINI = dict(LLM, embed_multiplier=12.0, logits_divisor=9.0, residual_multiplier=0.3)
SVA = dict(type="sva", side=4, windows=(1, 1, 2), width=16, heads=2, layers=2)
ABSTRACTOR = dict(type="c_abstractor", queries=4, width=16, depth=2, side=3, eos=1, norm="layer")
QLLAMA = dict(type="qformer", queries=4, width=16, mlp=24, layers=4, heads=2)
PERCEIVER = dict(
    type="perceiver", queries=3, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=20, mlp=28
)


def square(mode="pad", side=28):
    return ({"name": "square", "side": side, "mode": mode},)


def anyres(*pinpoints):
    return ({"name": "anyres", "side": 28, "pinpoints": pinpoints},)


ROWS = (("layout", "tiles"), ("unpad", "original"), ("newline", "row"))
MAX9 = dict(
    strategy=anyres(*((28 * i, 28 * j) for i in range(1, 5) for j in range(1, 5))),
    frame=square(),
    format=(*ROWS, ("max_tiles", 2)),
    frame_format=(("layout", "frames"), ("pool", "bilinear"), ("newline", "end")),
)
SHARED = (("vectors", ("boi", "eoi")), ("positions", "shared"))
NEWLINE = dict(specials=("newline",))

# name: model, what becomes of pictures, template
SYSTEMS = {
    "llava_1_5": (
        dict(vision=CLIP, connector={}, llm=LLM),
        dict(strategy=square()),
        "vicuna",
    ),
    "llava_next": (
        dict(vision=CLIP, connector=NEWLINE, llm=LLM),
        dict(strategy=anyres((28, 56), (56, 28), (56, 56)), frame=square(), format=ROWS)
        | dict(frame_format=(("layout", "frames"),)),
        "vicuna",
    ),
    "anyres_max": (
        dict(vision=SIG, connector=NEWLINE, llm=LLM | SCALED, pool="weighted"),
        MAX9,
        "qwen",
    ),
    "360vl": (
        dict(
            vision=CLIP, connector=ABSTRACTOR | dict(copies=("ctt", "ori")), sources=(0, 0), llm=LLM
        ),
        dict(strategy=({"name": "grid2x2", "side": 28},), stitch="tiles"),
        "llama3",
    ),
    "internvl": (
        dict(vision=INTERN, connector=dict(window=2, norm="layer"), llm=LLM),
        dict(
            strategy=({"name": "dynamic", "side": 28, "max_tiles": 4},),
            format=(("control", ("<img>", "</img>")),),
        ),
        "chatml",
    ),
    "minicpm_2_5": (
        dict(
            vision=dict(SIG, position="bucket", side=8),
            connector=dict(type="resampler", queries=4, heads=4),
            llm=LLM,
        ),
        dict(
            strategy=({"name": "uhd", "side": 28, "patch": 7, "max_slices": 4},),
            format=(("layout", "slices"),),
        ),
        "minicpm",
    ),
    "minicpm_2_0": (
        dict(
            vision=dict(SIG, position="bicubic_antialias", prefix=3, qk_norm=True, norm="rms"),
            connector=dict(type="resampler", queries=4, heads=4, query_pos="sincos"),
            llm=MINI,
        ),
        dict(
            strategy=({"name": "uhd", "side": 28, "patch": 7, "max_slices": 4},),
            format=(("layout", "slices"),),
        ),
        "minicpm",
    ),
    "vila_1_5": (
        dict(vision=dict(SIG, features="-2"), connector=dict(window=2, norm="layer"), llm=LLM),
        dict(strategy=square("resize"), format=(("tail", "\n"),)),
        "vicuna",
    ),
    "vila_s2": (
        dict(
            vision=dict(SIG, features="-2"),
            connector=dict(window=2, norm="layer", reduce="weighted"),
            llm=LLM,
            sources=(0, 0),
        ),
        dict(
            strategy=({"name": "s2", "side": 28, "scales": (28, 56)},),
            stitch="tiles",
            resample=((), ("area", (4, 4))),
        ),
        "vicuna",
    ),
    "cogvlm2": (
        dict(
            vision=EVA,
            connector=dict(type="conv_glu", hidden=40),
            llm=dict(LLM, expert="visual"),
        ),
        dict(strategy=square("resize"), format=SHARED),
        "cogvlm",
    ),
    "glm_4v": (
        dict(
            vision=EVA,
            connector=dict(type="conv_glu", hidden=40, conv="out", scaling=8.0),
            llm=dict(LLM, rotary=4),
        ),
        dict(strategy=square("resize"), format=SHARED),
        "glm4",
    ),
    "internvl_1_0": (
        dict(vision=CLIP, connector=QLLAMA, llm=LLM),
        dict(strategy=square()),
        "vicuna",
    ),
    "cambrian_1": (
        dict(
            vision=(SIG, dict(CLIP, position="table", side=5, grid=4), NEXT),
            connector=SVA,
            llm=dict(LLM, extra_num=2, extra_start=0, extra_stride=2, extra_place="attention"),
        ),
        dict(
            strategy=(*square(), *square(side=35), *square(side=64)),
            format=(("layout", "square"), ("unpad", "original"), ("newline", "row")),
        ),
        "llama3",
    ),
    "idefics2": (
        dict(vision=dict(SIG, position="bicubic", act="gelu", gated=True), connector=PERCEIVER)
        | dict(llm=LLM),
        dict(strategy=square("resize", 35)),
        "mistral",
    ),
    "videollama3": (
        dict(vision=dict(width=24, mlp=32, layers=2, heads=2, patch=7), connector={}, llm=LLM),
        None,
        "chatml",
    ),
}


def make_chat(name, seed=0):
    """Returns the `Chat` of a system, every parameter of it random."""
    model, picture, template = SYSTEMS[name]
    config = build.model_config(model)
    settings = dict(template=template, picture=picture, max_length=4096)
    if picture is None:
        settings |= dict(patch=7, min_visual_tokens=1, max_visual_tokens=60)
    processor = Processor(ProcessorConfig(**settings), TOKENIZER, config.form)
    return Chat(config, random_params(config, seed), processor)


def random_params(config, seed):
    rng = np.random.default_rng(seed)

    def draw(path, p):
        noise = rng.standard_normal(p.shape).astype(np.float32)
        kind = path.split("/")[-1]
        if kind in ("scale", "bias"):
            return (kind == "scale") + np.float32(0.2) * noise
        fan_in = np.sqrt(np.std(np.asarray(p)) + 0.02)
        return np.float32(0.3) * noise * np.float32(fan_in) + np.asarray(p)

    drawn = jax.tree.map(np.asarray, build.random_params(config, seed))
    return unflatten({path: draw(path, p) for path, p in drawn.items()})
