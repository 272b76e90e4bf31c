"""What holds for every decoder: packing, caching, experts, extra blocks, sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_case import REF, embed, grown, hidden, logits, routed
from flax import nnx

from vlmjax import nn
from vlmjax.attention import packed
from vlmjax.batch import Budget, empty_batch
from vlmjax.generate import decode
from vlmjax.generate.sampling import GREEDY
from vlmjax.llm import expert
from vlmjax.llm.decoder import Decoder, DecoderConfig
from vlmjax.llm.presets import PRESETS
from vlmjax.rope import angles_1d
from vlmjax.sharding import Layout
from vlmjax.vlm import VLM, VLMConfig

PLAIN = DecoderConfig(61, 32, 44, 2, 4, 2, 8)
CONFIGS = {
    "llama": dict(qkv_bias=False, tie=False),
    "qwen3": dict(qkv_bias=False, qk_norm="head", head_dim=10),
    "phi3": dict(rope_short=(1.0, 2, 3), rope_long=(2.0, 3, 5), rope_factors="long")
    | dict(rotary=6, rope_attention=1.2),
    "glm": dict(rotary=4),
    "minicpm": dict(embed_multiplier=12.0, residual_multiplier=0.7, logits_divisor=9.0),
    "granite": dict(attention_multiplier=0.2, o_bias=True, mlp_bias=True),
    "cogvlm": dict(expert="visual"),
    "longer": dict(rope_scale=2.0),
    "extra": dict(extra_num=1, extra_start=1),
}


class Extra(nnx.Module):
    """A stand-in for an SVA block: adds a function of some tokens to them."""

    def __init__(self, *, rngs):
        self.norm = nn.RMSNorm(32, 1e-6, rngs=rngs)
        self.dense = nn.Dense((32,), (32,), ("embed",), ("mlp",), rngs=rngs)

    def __call__(self, x):
        return x + jnp.sin(self.dense(self.norm(x)))


def _random(params, key=0):
    """Every leaf moved from its trivial value."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    noise = [
        0.3 * jax.random.normal(k, x.shape) * (0.5 + jnp.abs(x).mean())
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


@functools.cache
def _decoder(cfg):
    make = (lambda rngs: Extra(rngs=rngs)) if cfg.extra_num else None
    model = functools.partial(Decoder, cfg, extra=make)
    graphdef, _ = nn.unbind(jax.eval_shape(lambda: model(rngs=nnx.Rngs(0))))
    params = jax.jit(lambda: _random(nn.unbind(model(rngs=nnx.Rngs(0)))[1]))()
    return nn.bind(graphdef, params)


def _error(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def _options(cfg, mask):
    more = {}
    if cfg.expert != "none":
        more["routed"] = routed(mask)
    if cfg.extra_num:
        more["extra"] = lambda block, x: block(x)
    return more


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_equals_separate_equals_cached(kind):
    cfg = dataclasses.replace(PLAIN, **CONFIGS[kind])
    rng, T = np.random.default_rng(0), 9
    tokens, served = rng.integers(0, 61, (2, T)), rng.random((2, T)) < 0.4
    served[:, 4:] = False  # what is appended to a cache below is text
    shared = np.maximum(np.arange(T) - 2, 0)[None].repeat(2, 0)  # the first three share a position

    @jax.jit
    def run(model):
        x = embed(model, tokens)
        separate = logits(model, x, np.ones((2, T)), shared, **_options(cfg, served))
        row = jnp.concatenate([x[:1], x[1:], x[:1, :3]], 1)  # and padding
        segments = np.repeat([1, 2, 0], [T, T, 3])[None]
        positions = np.concatenate([shared[0], shared[1], shared[0, :3]])[None]
        chosen = np.concatenate([served[0], served[1], np.zeros(3, bool)])[None]
        together = logits(model, row, segments, positions, **_options(cfg, chosen))
        more = _options(cfg, served[:, :4])
        run_extra = {k: v for k, v in more.items() if k == "extra"}
        cached = grown(model, x, shared, (4, 3, 1, 1), then=run_extra, **more)
        return separate, together, cached

    separate, together, cached = run(_decoder(cfg))
    assert _error(together[0, : 2 * T].reshape(2, T, -1), separate) < 1e-5
    assert _error(cached, separate) < 1e-5


def test_scaled_positions_are_positions_divided():
    half = dataclasses.replace(PLAIN, rope_scale=2.0)
    model = _decoder(PLAIN)
    scaled = nn.bind(nn.unbind(_decoder(half))[0], nn.unbind(model)[1])
    x, ones = jax.random.normal(jax.random.key(0), (1, 7, 32)), np.ones((1, 7))
    even = 2 * np.arange(7)[None]
    assert _error(hidden(scaled, x, ones, even), hidden(model, x, ones)) < 1e-6


def test_expert_is_a_dense_choice_in_value_and_gradient_without_scatter():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 8)) < 0.4
    mask[2] = False
    x = rng.normal(size=(3, 8, 5)).astype(np.float32)
    weights = rng.normal(size=(2, 5, 6)).astype(np.float32)

    def apply(w, x):
        y = x @ w
        return jnp.sin(y), jnp.tanh(y[..., None] * y[..., None, :])

    def gathered(weights, x):
        a, b = (functools.partial(apply, w) for w in weights)
        return expert.serve(routed(mask, spare=2), a, b, x)

    def dense(weights, x):
        a, b = (apply(w, x) for w in weights)
        pick = lambda a, b: jnp.where(mask.reshape(3, 8, *(1,) * (a.ndim - 2)), b, a)  # noqa: E731
        return jax.tree.map(pick, a, b)

    def total(f):
        return lambda *args: sum((jnp.cos(y) * y).sum() for y in f(*args))

    for ours, want in zip(gathered(weights, x), dense(weights, x), strict=True):
        assert np.array_equal(ours, want)
    ours, want = (jax.grad(total(f), argnums=(0, 1))(weights, x) for f in (gathered, dense))
    assert max(map(_error, ours, want)) < 1e-6
    program = str(jax.make_jaxpr(jax.grad(total(gathered), argnums=(0, 1)))(weights, x))
    assert "scatter" not in program


def test_expert_costs_the_tokens_it_serves():
    cfg = dataclasses.replace(PLAIN, expert="visual", layers=1, mlp=256, width=128)
    model, T, W = _decoder(cfg), 64, 16
    shape = jax.ShapeDtypeStruct((1, T, 128), jnp.float32)

    def flops(**more):
        block = jax.tree.map(lambda p: p[0], nn.unbind(model.blocks)[1])
        graphdef = nn.unbind(model.blocks)[0]
        attend = lambda q, k, v, cache: (q, None)  # noqa: E731
        run = jax.jit(lambda p, x: nn.bind(graphdef, p)(x, attend, None, **more)[0])
        return run.lower(block, shape).compile().cost_analysis()["flops"]

    served = np.arange(T)[None] < W
    share = flops(routed=routed(served, spare=0)) / flops()
    assert 1 + W / T <= share < 1 + W / T + 0.05


def _unrolled(model, x, segments):
    """The layers one by one, the extra blocks after those that the configuration names."""
    cfg, at = model.cfg, lambda tree, i: jax.tree.map(lambda p: p[i], tree)
    angles = angles_1d(np.arange(x.shape[1])[None], cfg.head_dim, cfg.rope_theta)
    angles = jnp.broadcast_to(angles, (len(x), *angles.shape[1:]))
    attend = packed(segments, angles, size=cfg.head_dim, causal=True, spec=REF, layout=Layout())
    (block_def, blocks), (extra_def, extras) = (nn.unbind(m) for m in (model.blocks, model.extra))
    number = 0
    for i in range(cfg.layers):
        here = number < cfg.extra_num and i == cfg.extra_start + number * cfg.extra_stride
        run = nn.bind(extra_def, at(extras, number)) if here else lambda x: x
        inside = run if cfg.extra_place == "attention" else None
        x, _ = nn.bind(block_def, at(blocks, i))(x, attend, None, between=inside)
        x, number = x if inside else run(x), number + here
    assert number == cfg.extra_num
    return model.norm(x)


@pytest.mark.parametrize(
    "start, stride, num, place, remat",
    [(0, 2, 2, "layer", "attention"), (1, 1, 1, "layer", "none"), (0, 1, 3, "attention", "full")],
)
def test_extra_blocks_come_after_their_layers(start, stride, num, place, remat):
    extra = dict(extra_start=start, extra_stride=stride, extra_num=num, extra_place=place)
    cfg = dataclasses.replace(PLAIN, layers=3, **extra)
    model, segments = _decoder(cfg), np.ones((2, 6), np.int32)
    graphdef, params = nn.unbind(model)
    assert params["extra"]["dense"]["kernel"].shape == (num, 32, 32)
    x = jax.random.normal(jax.random.key(0), (2, 6, 32))

    def value(params, remat):
        m = nn.bind(graphdef, params)
        if remat is None:
            return jnp.square(_unrolled(m, x, segments)).sum()
        run = dict(extra=lambda block, x: block(x), remat=remat)
        return jnp.square(hidden(m, x, segments, **run)).sum()

    grad = jax.jit(jax.value_and_grad(value), static_argnums=1)
    with jax.enable_x64(True):  # the gradient of a key's bias cancels: 1.3e-5 apart in float32
        params, x = jax.tree.map(lambda a: a.astype(jnp.float64), (params, x))
        ours, want = grad(params, remat), grad(params, None)
    near = lambda a, b: np.abs(a - b).max() / (np.abs(b).max() + 1e-6)  # noqa: E731
    assert max(jax.tree.leaves(jax.tree.map(near, ours, want))) < 1e-5


def test_generation_goes_on_behind_shared_positions():
    cfg, new = VLMConfig(None, None, PLAIN), 4
    graphdef, _ = nn.unbind(jax.eval_shape(lambda: VLM(cfg, rngs=nnx.Rngs(0))))
    params = {"llm": nn.unbind(_decoder(PLAIN))[1]}
    rng, lengths = np.random.default_rng(0), np.array([7, 5], np.int32)
    batch = empty_batch(2, Budget(8, 0, 0), cfg.form)
    batch.tokens[:] = rng.integers(0, 61, (2, 8))
    for row, n in enumerate(lengths):
        batch.segments[row, :n] = 1
        batch.positions[row, :n] = np.maximum(np.arange(n) - 2, 0)
    after = decode._next_positions(batch, lengths)
    assert after.tolist() == [5, 3]
    scores, cache = decode.prefill(graphdef, params, batch, lengths, 8 + new)
    args = lengths, np.arange(2, dtype=np.int32), np.int32(0), np.array([-5]), np.int32(new)
    done = decode.decode(
        graphdef, params, cache, scores, *args, new=new, sampling=GREEDY, positions=after
    )
    model = nn.bind(graphdef, params).llm
    for row, n in enumerate(lengths):
        tokens = np.concatenate([batch.tokens[row, :n], done.tokens[row]])[None]
        positions = np.maximum(np.arange(n + new) - 2, 0)[None]
        full = logits(model, embed(model, tokens), np.ones_like(tokens), positions)
        assert full[0, n - 1 : -1].argmax(-1).tolist() == done.tokens[row].tolist()


def test_impossible_settings_are_refused():
    for settings, message in (
        (dict(expert="text"), "expert='text' is unknown"),
        (dict(rotary=3), "rotary=3"),
        (dict(rope_factors="long"), "rope_long has 0 divisors"),
        (dict(rope_short=(1.0,)), "rope_short has 1 divisors"),
        (dict(extra_num=2, extra_stride=2), "after layer 2 of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(PLAIN, **settings)
    with pytest.raises(ValueError, match="give both or none"):
        Decoder(dataclasses.replace(PLAIN, extra_num=1), rngs=nnx.Rngs(0))
    x, ones = jnp.zeros((1, 2, 32)), np.ones((1, 2))
    with pytest.raises(ValueError, match="expert='none'"):
        hidden(_decoder(PLAIN), x, ones, routed=routed(ones > 0))
    with pytest.raises(ValueError, match="extra_num=0"):
        hidden(_decoder(PLAIN), x, ones, extra=lambda block, x: x)


# What the publishers say, and for CogVLM2 and MiniCPM the totals of their checkpoints less the
# vision tower, the connector and (CogVLM2) 2,048 stored constants.
OFFICIAL = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "mistral_7b_v0_2": 7_241_732_096,
    "yi_34b": 34_388_917_248,
    "qwen2_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_8b": 8_190_735_360,
    "internlm2_1_8b": 1_889_110_016,
    "phi3_mini_4k": 3_821_079_552,
    "minicpm_2_4b": 6_869_931_584 // 2 - 29_514_240 - 397_747_744,
    "cogvlm2_llama3_8b": 39_006_214_656 // 2 - 2_048 - 4_493_325_568,
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes(name):
    cfg = DecoderConfig(**PRESETS[name])
    shapes = jax.eval_shape(lambda: nn.unbind(Decoder(cfg, rngs=nnx.Rngs(0)))[1])
    assert sum(x.size for x in jax.tree.leaves(shapes)) == OFFICIAL[name]


def test_every_preset_is_possible():
    for row in PRESETS.values():
        DecoderConfig(**row)
