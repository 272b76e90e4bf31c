"""Encoders x connectors x strategies: each cell builds, or is refused with a reason.

Widths are tiny, the structure of encoders is that of their presets; a cell that builds gives logits
abstractly, and sixty of them train a step for real.
"""

import collections
import functools
import itertools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vlmjax import build, compatible
from vlmjax.batch import empty_batch
from vlmjax.data.pack import pack
from vlmjax.data.picture import PictureConfig, Show, row_budget
from vlmjax.data.processor import Processor, ProcessorConfig, control_tokens
from vlmjax.data.tokenizer import byte_tokenizer
from vlmjax.nn import bind, unbind
from vlmjax.objectives import OBJECTIVES
from vlmjax.train.optimizer import OptimConfig, make_optimizer
from vlmjax.train.step import init_state, make_train_step
from vlmjax.vlm import VLM

TINY = dict(width=24, mlp=32, layers=2, heads=2, patch=6)
CONV = dict(widths=(8, 12), depths=(1, 1), rows=8, columns=8, grid=4, patch=3)
ENCODERS = {
    **{
        name: TINY | dict(preset=name, side=4)
        for name in (
            "siglip_so400m_14_384",
            "siglip_navit",
            "siglip_minicpm_v_2",
            "clip_l_14_336",
            "dfn5b_h_14_378",
            "internvit_6b_v1_0",
            "internvit_6b_v1_5",
            "internvit_300m",
            "dinov2_l_14",
            "dinov2_l_14_reg4",
            "eva2_clip_e",
        )
    },
    "convnext_xxl": dict(type="convnext", preset="convnext_xxl", **CONV),
}
QUERIES = dict(queries=4)
CONNECTORS = {
    "mlp": dict(layers=2),
    "space_to_depth": dict(layers=2, window=2, norm="layer"),
    "space_to_depth_v1": dict(layers=2, window=2, norm="layer", order="column"),
    "c_abstractor": dict(type="c_abstractor", width=16, depth=2, side=4, **QUERIES),
    "resampler": dict(type="resampler", heads=2, query_pos="sincos", **QUERIES),
    "perceiver": dict(type="perceiver", heads=2, kv_heads=1, head_dim=8, layers=1, **QUERIES),
    "qformer": dict(type="qformer", width=16, mlp=24, layers=2, heads=2, **QUERIES),
    "sva": dict(type="sva", side=4, windows=(1,), width=16, heads=2, layers=1),
    "conv_glu": dict(type="conv_glu", hidden=24),
}
SIDE = 24
CANVASES = tuple((SIDE * i, SIDE * j) for i, j in ((1, 2), (2, 1), (2, 2)))
ANYRES = dict(strategy=(dict(name="anyres", side=SIDE, pinpoints=CANVASES),))
ROWS = (("layout", "tiles"), ("unpad", "original"), ("newline", "row"))
# Strategy -> settings of pictures, of the model.
STRATEGIES = {
    "square": (dict(strategy=(dict(name="square", side=SIDE),)), {}),
    "grid2x2": (dict(strategy=(dict(name="grid2x2", side=SIDE),), stitch="tiles"), {}),
    "anyres": (ANYRES | dict(format=ROWS), {}),
    "anyres_max": (ANYRES | dict(format=(*ROWS, ("max_tiles", 1))), dict(pool="weighted")),
    "dynamic": (dict(strategy=(dict(name="dynamic", side=SIDE, max_tiles=4),)), {}),
    "uhd": (
        dict(
            strategy=(dict(name="uhd", side=SIDE, patch=6, max_slices=4),),
            format=(("layout", "slices"),),
        ),
        {},
    ),
    "s2": (
        dict(
            strategy=(dict(name="s2", side=SIDE, scales=(SIDE, 2 * SIDE)),),
            stitch="tiles",
            resample=((), ("area", (4, 4))),
        ),
        dict(sources=(0, 0)),
    ),
    "native": (dict(strategy=(dict(name="native", patch=6, min_tokens=4, max_tokens=64),)), {}),
}
CELLS = list(itertools.product(ENCODERS, CONNECTORS, STRATEGIES))
LLM = dict(vocab=320, width=16, mlp=24, layers=1, heads=2, kv_heads=1, head_dim=8)


def cell(encoder, connector, strategy):
    """Returns (VLMConfig, PictureConfig settings); ValueError where they do not fit."""
    picture, model = STRATEGIES[strategy]
    chosen = dict(CONNECTORS[connector])
    kind = chosen.get("type", "mlp")
    if "newline" in dict(picture.get("format", ())):
        own = ("boi", "eoi") if kind == "conv_glu" else ()
        chosen["specials"] = (*own, "newline")
    if "resample" in picture and kind == "mlp":
        chosen["reduce"] = "weighted"
    compute = dict(attention="ref", loss_chunk=0)  # compiles fastest
    values = dict(vision=ENCODERS[encoder], connector=chosen, llm=LLM, compute=compute, **model)
    model = build.model_config(values)
    compatible.check(model, picture)
    return model, picture


def reason(error):
    """Returns which two parts disagree, without their values."""
    return re.sub(r"=.*?(?= and | of |$)", "", str(error).split(" disagree")[0])


@functools.cache
def walk():
    """Returns ({cell: (model, picture)} of those that fit, {cell: reason} of the others)."""
    fit, refused = {}, {}
    for names in CELLS:
        try:
            fit[names] = cell(*names)
        except ValueError as error:
            assert " disagree" in str(error), (names, error)
            refused[names] = reason(error)
    return fit, refused


def test_the_product_is_what_was_meant():
    assert [len(x) for x in (ENCODERS, CONNECTORS, STRATEGIES)] == [12, 9, 8]
    kinds = {connector.get("type", "mlp") for connector in CONNECTORS.values()}
    assert kinds == set(build.CONNECTORS)


# Cells that the rules let pass. Pinned: a rule that refuses more or less has to say so here.
FIT = 452


def test_how_many_fit():
    fit, refused = walk()
    print(f"\n{len(fit)} of {len(CELLS)} cells pass the rules; the others:")
    for why, number in collections.Counter(refused.values()).most_common():
        print(f"{number:5d}  {why}")
    assert len(fit) == FIT and len(fit) + len(refused) == len(CELLS) == 864


PAIR = (ENCODERS["siglip_so400m_14_384"], ENCODERS["siglip_navit"])
TWICE = dict(strategy=2 * STRATEGIES["square"][0]["strategy"])
UNLIKE = dict(strategy=tuple(dict(name="square", side=side) for side in (SIDE, 30)))


@pytest.mark.parametrize(
    ("connector", "model", "picture", "why"),
    [
        *((name, {}, TWICE, "it takes 1") for name in ("resampler", "perceiver", "qformer")),
        ("conv_glu", {}, TWICE, "it takes 1"),
        ("c_abstractor", {}, TWICE, "it takes 1, which of the C-Abstractor are its `copies`"),
        ("resampler", dict(vision=PAIR[0], sources=(0, 0)), STRATEGIES["s2"][0], "it takes 1"),
        ("mlp", {}, UNLIKE, r"form \{0: \(\(4, 4\),\), 1: \(\(5, 5\),\)\}"),
        ("mlp", {}, TWICE, None),
    ],
)
def test_several_sources(connector, model, picture, why):
    """Connectors of one source take one, and maps that are joined have one size."""
    values = dict(vision=PAIR, connector=CONNECTORS[connector], llm=LLM) | model
    model = build.model_config(values)
    if why is None:
        compatible.check(model, picture)
        return
    with pytest.raises(ValueError, match="disagree: .*" + why):
        compatible.check(model, picture)


@pytest.mark.long
@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_fits_gives_logits(encoder):
    """Abstractly, of rows of 96 tokens and 10 views."""
    for names, (model, picture) in walk()[0].items():
        if names[0] == encoder:
            show = Show(PictureConfig(**picture), model.form)
            batch = empty_batch(1, row_budget(show, 96, 10), model.form)
            shapes = jax.eval_shape(lambda m=model: VLM(m, rngs=nnx.Rngs(0)))
            graphdef, params = unbind(shapes)
            logits = jax.eval_shape(lambda p, b, g=graphdef: bind(g, p).logits(b), params, batch)
            assert logits.shape == (1, 96, LLM["vocab"]), names


@functools.cache
def tokenizer():
    control = control_tokens(ProcessorConfig(template="chatml", picture=STRATEGIES["uhd"][0]))
    return byte_tokenizer((*control, "<|endoftext|>"))


def samples(model, picture):
    """Returns samples of two random pictures, wide and high."""
    process = Processor(
        ProcessorConfig(template="chatml", picture=picture), tokenizer(), model.form
    )
    rng, made = np.random.default_rng(0), []
    for number, size in enumerate(((40, 70, 3), (60, 25, 3))):
        image = Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8))
        asked = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "a cat and a dog"},
        ]
        made.append(process({"id": str(number), "messages": messages}))
    return made


@functools.cache
def drawn():
    """Returns sixty cells that fit, drawn once and for all."""
    fit = sorted(walk()[0])
    return [fit[k] for k in np.random.default_rng(4).choice(len(fit), 60, replace=False)]


@pytest.mark.long
@pytest.mark.parametrize("number", range(60))
def test_a_cell_takes_a_step(number):
    """The loss of its two samples falls, and something of every part moves."""
    model, picture = walk()[0][drawn()[number]]
    both = samples(model, picture)
    tokens = sum(len(s.tokens) for s in both)
    views = sum(item.encoder == 0 for s in both for item in s.items)
    budget = row_budget(Show(PictureConfig(**picture), model.form), tokens, views + 2)
    batch, _ = pack([both], budget, model.form)
    graphdef, shapes, _ = build.abstract(model)
    lrs = dict.fromkeys(shapes, 1e-3)
    optimizer = make_optimizer(OptimConfig(warmup=0.0), lrs, 10)
    step = jax.jit(make_train_step(graphdef, OBJECTIVES["sft"], optimizer))
    first = init_state(build.random_params(model, 0), lrs, optimizer, "float32")
    state, values = step(first, batch)
    assert step(state, batch)[1]["loss"] < values["loss"]
    for module in ("vision", "connector", "llm"):
        assert values[f"grad_norm/{module}"] > 0
