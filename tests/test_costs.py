"""What towers, connectors and the decoder cost, against XLA's own count of one layer of each."""

import jax
import numpy as np
import pytest
from flax import nnx

from vlmjax import connectors
from vlmjax.batch import Patches, Routed
from vlmjax.connectors.sva import Sources, SVABlock
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.llm.decoder import Decoder, DecoderConfig
from vlmjax.llm.expert import serve
from vlmjax.nn import MLP, bind, unbind
from vlmjax.train import costs
from vlmjax.vision.convnext import ConvNeXt, ConvNeXtConfig
from vlmjax.vision.vit import ViT, ViTConfig

REF = AttentionSpec("ref")
VIT = dict(width=192, mlp=512, layers=1, heads=2, patch=8)
TOWERS = {
    "rope": ViTConfig(**VIT),
    "gated, class token and register": ViTConfig(
        **VIT | dict(layers=2), features="-2", gated=True, prefix=2, position="table", side=8
    ),
    "convnext": ConvNeXtConfig((192, 256), (1, 1), rows=8, columns=8, grid=2, kernel=3),
}
# Of a connector: its config, and (units, features of each, channels) of each source.
CONNECTORS = {
    "mlp": (connectors.MLPConfig(layers=2, hidden=(192,)), [(48, 1, 128)]),
    "normed windows of two": (
        connectors.MLPConfig(window=2, norm="layer"),
        [(48, 4, 96), (48, 4, 64)],
    ),
    "conv_glu in": (connectors.ConvGLUConfig(hidden=320), [(32, 4, 128)]),
    "conv_glu out": (connectors.ConvGLUConfig(hidden=320, conv="out"), [(32, 4, 128)]),
    "conv_glu none": (connectors.ConvGLUConfig(hidden=320, window=1), [(32, 1, 128)]),
    "c_abstractor": (
        connectors.CAbstractorConfig(queries=4, width=192, depth=2, side=8),
        [(2, 64, 128)],
    ),
    "resampler": (connectors.ResamplerConfig(queries=16, heads=4), [(3, 40, 128)]),
    "perceiver": (
        connectors.PerceiverConfig(queries=16, layers=1, heads=4, kv_heads=2, head_dim=48),
        [(3, 40, 128)],
    ),
    "gated perceiver": (
        connectors.PerceiverConfig(queries=16, layers=1, heads=4, head_dim=48, hidden=320),
        [(3, 40, 128)],
    ),
    "qformer": (
        connectors.QFormerConfig(queries=24, width=192, mlp=512, layers=1, heads=2, every=1),
        [(3, 40, 128)],
    ),
    "sva": (
        connectors.SVAConfig(side=4, windows=(1, 2), width=192, heads=2, layers=1),
        [(3, 16, 128), (3, 64, 96)],
    ),
}
OUT = 256


def counted(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def check(make, call, x, cost, kinds=("first", "behind")):
    """Compares the FLOPs of a part with XLA's: trained first of all, and behind another; or frozen.

    XLA counts elementwise work too, a few per cent at these widths.
    """
    graphdef, params = unbind(jax.eval_shape(lambda: make(nnx.Rngs(0))))

    def loss(params, x):
        out = call(bind(graphdef, params), x)
        return (out * out).sum()

    weights, first, attention = cost
    count = {
        "frozen": (weights + attention, loss),
        "first": (3 * (weights + attention) - first, jax.grad(loss)),
        "behind": (3 * (weights + attention), jax.grad(loss, (0, 1))),
        "through": (2 * weights + 3 * attention, jax.grad(loss, 1)),
    }
    for kind in kinds:
        ours, f = count[kind]
        xla = counted(f, params, x)
        assert 0.9 * xla < ours < 1.02 * xla, (kind, ours / xla)


@pytest.mark.parametrize("name", TOWERS)
def test_tower(name):
    cfg, views = TOWERS[name], 2
    convolves = isinstance(cfg, ConvNeXtConfig)
    slots = cfg.rows * cfg.columns if convolves else 64 + cfg.prefix
    patches = Patches(
        jax.ShapeDtypeStruct((views, slots, cfg.patch_dim), np.float32),
        jax.ShapeDtypeStruct((views, slots), np.int32),
        jax.ShapeDtypeStruct((views, slots, 2), np.float32),
    )

    def call(tower, pixels):
        return tower(Patches(pixels, *others), attention=REF)

    others = [np.ones(x.shape, x.dtype) for x in patches[1:]]
    kind = ConvNeXt if convolves else ViT
    cost = costs.tower(cfg, views * slots, views * slots**2)
    # XLA counts the gradient of a depthwise kernel as if it were one of all pairs of channels.
    kinds = ("frozen", "through") if convolves else ("first", "behind")
    check(lambda rngs: kind(cfg, rngs=rngs), call, patches.pixels, cost, kinds)


@pytest.mark.parametrize("name", CONNECTORS)
def test_connector(name):
    cfg, sources = CONNECTORS[name]
    module = dict(connectors.CONNECTORS.values())[type(cfg)]
    widths = tuple(width for *_, width in sources)
    x = [jax.ShapeDtypeStruct((1, *shape), np.float32) for shape in sources]
    masks = tuple(np.ones(f.shape[:3], bool) for f in x)
    size = np.full((1, sources[0][0], 2), 8, np.int32)
    units, features = zip(*((n, n * group) for n, group, _ in sources), strict=True)
    check(
        lambda rngs: module(cfg, widths, OUT, rngs=rngs),
        lambda m, x: m(tuple(x), masks, size),
        x,
        costs.connector(cfg, widths, OUT, units, features),
    )


def test_sva_block_of_the_decoder():
    cfg, sources = CONNECTORS["sva"]
    read = [(16, side**2) for side in cfg.windows]
    x = [jax.ShapeDtypeStruct((1, 3, 16, OUT), np.float32)]
    x += [jax.ShapeDtypeStruct((1, 3, *shape, cfg.width), np.float32) for shape in read]
    x.append(jax.ShapeDtypeStruct((1, 3, 1, cfg.width), np.float32))
    masks = tuple(np.ones(f.shape[:4], bool) for f in x[1:-1])

    def call(block, x):
        return block(x[0], Sources(tuple(x[1:-1]), masks, x[-1]))

    check(lambda rngs: SVABlock(cfg, OUT, rngs=rngs), call, x, costs.sva_block(cfg, OUT, 3))


def test_decoder():
    cfg = DecoderConfig(64, 256, 640, 1, 4, 2, 64, qk_norm="head", o_bias=True, rotary=32)
    positions, segments = np.arange(96)[None], np.ones((1, 96), np.int32)
    check(
        lambda rngs: Decoder(cfg, rngs=rngs),
        lambda m, x: m(x, positions, segments, attention=REF)[0],
        jax.ShapeDtypeStruct((1, 96, 256), np.float32),
        # Dense attention computes both halves.
        costs.decoder(cfg, 96, 2 * 96**2),
    )


def test_an_expert_costs_the_tokens_it_serves():
    """Executed are T + W tokens; the model count has each token once."""
    slots = np.arange(32, dtype=np.int32)[None]
    index = np.concatenate([slots, np.full((1, 64), -1, np.int32)], 1)
    x = jax.ShapeDtypeStruct((1, 96, 128), np.float32)

    def make():
        return MLP(128, 384, "silu", rngs=nnx.Rngs(0), gated=True, bias=False)

    graphdef, params = unbind(jax.eval_shape(make))

    routed = Routed(slots, index)

    def run(params, other, x):
        return serve(routed, bind(graphdef, params), bind(graphdef, other), x)

    flops = counted(run, params, params, x)
    assert 0.9 * flops < 2 * (96 + 32) * 3 * 128 * 384 < 1.02 * flops
