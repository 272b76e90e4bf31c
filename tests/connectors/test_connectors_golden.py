"""Connectors against outputs of the original code, weights read through the key tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import (
    Golden,
    cells,
    flat,
    gather,
    golden_connector,
    load,
    random_connector,
    run,
    whole,
    windows,
)
from flax import nnx

from vlmjax.connectors import (
    CAbstractorConfig,
    ConvGLUConfig,
    MLPConfig,
    QFormerConfig,
    ResamplerConfig,
    SVAConfig,
    units,
)
from vlmjax.connectors.attend import AttentionPool
from vlmjax.connectors.c_abstractor import bicubic, resample
from vlmjax.connectors.resampler import sincos
from vlmjax.connectors.sva import SVABlock
from vlmjax.hf import connectors as tables
from vlmjax.hf import table as table_of_keys
from vlmjax.nn import bind, flatten, unbind

VILA = {
    "linear": dict(layers=1),
    "mlp2x_gelu": dict(layers=2),
    "mlp3x_gelu": dict(layers=3),
    "mlp_downsample": dict(window=2, norm="layer"),
    "mlp_downsample_2x2_fix": dict(window=2, norm="layer"),
    "mlp_downsample_3x3_fix": dict(window=3, norm="layer", hidden=(36,)),
    "mlp_downsample_3x3_s2": dict(window=3, norm="layer", hidden=(36, 12, 4)),
    "mlp_downsample_3x3_s2_new": dict(window=3, norm="layer", hidden=(48, 24, 12, 4)),
}


@pytest.mark.parametrize("name", VILA)
def test_vila(name):
    golden, cfg = Golden("vila"), MLPConfig(**VILA[name])
    connector = golden_connector("mlp", cfg, (12,), 10, "vila", golden.weights, f"{name}.layers.")
    for side in golden.config["token_grid_sides"]:
        if f"out/{name}_{side}" not in golden.arrays:
            continue
        x, mask = gather(golden[f"in/x_{side}"], windows(side, side, cfg.window))
        golden.close(f"{name}_{side}", flat(run(connector, (x,), (mask,))))


def test_vila_scales():
    """Two scales as two sources, on the grid of either: channels of a place side by side."""
    golden = Golden("vila")
    kernel, bias = (jnp.asarray(golden.weights[f"s2_patch.{x}"]) for x in ("weight", "bias"))
    big = golden["in/s2_image"].transpose(0, 2, 3, 1)

    def patches(image):
        R, S, _, C = image.shape
        x = image.reshape(R, S // 4, 4, S // 4, 4, C).transpose(0, 1, 3, 5, 2, 4)
        return x.reshape(R, (S // 4) ** 2, -1) @ kernel.reshape(12, -1).T + bias

    features = [patches(resample(big, bicubic(16, 8))), patches(big)]
    connector = random_connector("mlp", MLPConfig(), (12, 12), 10)
    repeat = np.arange(4, dtype=np.int32).reshape(2, 2).repeat(2, 0).repeat(2, 1)
    for to, index in (
        (0, (windows(2, 2, 1), windows(4, 4, 2))),
        (1, (repeat.reshape(1, 16, 1), windows(4, 4, 1))),
    ):
        sources = [gather(f, u) for f, u in zip(features, index, strict=True)]
        golden.close(f"s2_to{to}", connector.merge(*zip(*sources, strict=True)))


@pytest.mark.parametrize(("version", "order"), [("v1", "column"), ("v2", "row")])
def test_pixel_shuffle(version, order):
    golden, cfg = Golden("pixel_shuffle"), MLPConfig(window=2, norm="layer", order=order)
    connector = golden_connector("mlp", cfg, (6,), 10, "internvl", golden.weights, "mlp1.")
    x, mask = gather(golden["in/vit_tokens"][:, 1:], windows(6, 6, 2, cfg.unit.order))
    golden.close(f"tokens_{version}", flat(run(connector, (x,), (mask,))))
    grid = golden["in/grid"]
    merged = connector.merge(
        *((v,) for v in gather(grid.reshape(2, 24, 3), windows(4, 6, 2, order)))
    )
    golden.close(f"grid_{version}", merged.reshape(golden[f"out/grid_{version}"].shape))


def _abstractor(golden, copies, **kwargs):
    c = golden.config
    sizes = dict(queries=c["num_queries"], width=c["hidden_size"], depth=c["depth"])
    cfg = CAbstractorConfig(**sizes, layers=c["mlp_depth"], side=c["grid"], copies=copies)
    ins, out = (c["encoder_hidden_size"],) * len(copies), c["output_hidden_size"]
    module = tables.abstract("c_abstractor", cfg, ins, out)
    for name in copies:
        copy = load(getattr(module, name), "360vl", golden.weights, f"mm_projector_{name}.")
        setattr(module, name, copy)
    return module


@pytest.mark.parametrize(("name", "copy"), [("native", "ori"), ("resized", "ctt")])
def test_c_abstractor(name, copy):
    golden = Golden("cabs")
    x = golden[f"in/x_{name}"]
    tokens = run(_abstractor(golden, (copy,)), (x[:, None],), None)
    golden.close(f"y_{name}", tokens[:, 0])


def test_c_abstractor_pair():
    """The map of four crops through one copy, the global view through the other."""
    golden = Golden("cabs")
    n, C = golden.config["grid"], golden.config["encoder_hidden_size"]
    slot = np.arange(5 * n * n, dtype=np.int32).reshape(5, n, n)
    crops = np.block([[slot[0], slot[1]], [slot[2], slot[3]]]).reshape(1, 1, -1)
    views = golden["in/views"].reshape(1, -1, C)
    x, mask = zip(
        *(units.gather(views, u) for u in (crops, slot[4].reshape(1, 1, -1))), strict=True
    )
    golden.close("packed", flat(run(_abstractor(golden, ("ctt", "ori")), x, mask))[0])


def test_resampler_minicpm20():
    golden, c = Golden("resampler_minicpm20"), Golden("resampler_minicpm20").config
    cfg = ResamplerConfig(c["num_queries"], c["num_heads"], "sincos")
    D = c["embed_dim"]
    connector = golden_connector("resampler", cfg, (c["kv_dim"],), D, "resampler", golden.weights)
    np.testing.assert_allclose(
        tables.constants(cfg, D)["pos_embed"], golden["w/pos_embed"], atol=1e-6
    )
    for k, (h, w) in enumerate(golden["in/sizes"]):
        at = np.arange(h * w)
        golden.close(f"pos_{k}", sincos(at // w, at % w, D))
        x, mask = gather(golden[f"in/x_{k}"], whole(h * w))
        size = np.broadcast_to(np.array([h, w], np.int32), (len(x), 1, 2))
        golden.close(f"y_{k}", run(connector, (x,), (mask,), size)[:, 0])


def test_resampler_minicpm25():
    """Views of several sizes in one row; what lies behind their patches does not matter."""
    golden = Golden("resampler_minicpm25")
    c, x, size = golden.config, golden["in/x"], golden["in/tgt_sizes"]
    cfg = ResamplerConfig(c["num_queries"], c["num_heads"])
    connector = golden_connector(
        "resampler", cfg, (c["kv_dim"],), c["embed_dim"], "resampler", golden.weights
    )
    R, G, C = x.shape
    at = np.arange(G)
    index = np.where(at < size.prod(1)[:, None], np.arange(R)[:, None] * G + at, -1)
    x, mask = units.gather(x.reshape(1, R * G, C), index[None].astype(np.int32))
    golden.close("y", run(connector, (x,), (mask,), size[None])[0])
    hidden = np.where(np.asarray(mask)[..., None], x, 1e3)
    golden.close("y", run(connector, (hidden,), (mask,), size[None])[0])


def test_qllama():
    golden = Golden("qllama")
    q, Q = golden.config["qllama"], golden.config["num_query_token"]
    D = q["hidden_size"]
    sizes = dict(width=D, mlp=q["intermediate_size"], layers=q["num_hidden_layers"])
    cfg = QFormerConfig(queries=Q, heads=q["num_attention_heads"], out_layers=0, **sizes)
    vit = golden["out/vit"]
    connector = golden_connector("qformer", cfg, vit.shape[-1:], D, "qllama", golden.weights)
    x, mask = gather(vit, whole(vit.shape[1]))
    tokens = run(connector, (x,), (mask,))[:, 0]
    for name in ("itc", "itg"):
        theirs = golden[f"out/hidden_{name}"]
        error = np.abs(tokens - theirs[:, :Q]).max()
        assert error <= golden.meta["tolerance"]["rel"] * np.abs(theirs).max()
    heads, width = golden.config["attn_pool_num_heads"], golden.config["clip_embed_dim"]
    for name, key, x in (
        ("vit_pool", "clip_projector", vit),
        ("query_pool", "clip_projector2", tokens),
    ):
        pool = AttentionPool(x.shape[-1], width, heads, rngs=nnx.Rngs(0))
        pool = load(pool, "attention_pool", golden.weights, f"{key}.")
        golden.close(name, run(pool, x, np.ones(x.shape[:2], bool)))


def _conv_glu(golden, cfg, weights, prefix, hidden):
    """The features of an image between boi and eoi, from those of the tower, class token first."""
    v, D = golden.config["vision"], golden.config["hidden_size"]
    connector = golden_connector("conv_glu", cfg, hidden.shape[-1:], D, "conv_glu", weights, prefix)
    side = v["image_size"] // v["patch_size"]
    x, mask = gather(hidden[:, 1:], windows(side, side, 2))
    tokens, specials = flat(run(connector, (x,), (mask,))), connector.specials()
    assert connector.specials.names == cfg.specials == ("boi", "eoi")
    boi, eoi = (np.broadcast_to(s, (len(tokens), 1, D)) for s in specials)
    golden.close("image_features", np.concatenate([boi, tokens, eoi], 1))


def test_conv_glu_of_cogvlm2():
    golden = Golden("cogvlm2")
    cfg = ConvGLUConfig(hidden=golden.config["intermediate_size"])
    hidden = golden["out/vision_hidden"]
    _conv_glu(golden, cfg, golden.weights, "model.vision.", hidden)


def _eva_tower(golden):
    """The tower of GLM-4V written out: blocks whose norms come after attention and MLP."""
    v = golden.config["vision"]
    w = {k.removeprefix("vision."): x for k, x in golden.weights.items()}
    images, p, N = golden["in/images"], v["patch_size"], v["num_heads"]
    R, C, S, _ = images.shape
    patches = images.reshape(R, C, S // p, p, S // p, p).transpose(0, 2, 4, 1, 3, 5)

    def linear(x, key):
        return x @ w[f"{key}.weight"].reshape(len(w[f"{key}.weight"]), -1).T + w[f"{key}.bias"]

    def norm(x, key):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + v["layer_norm_eps"])
        return x * w[f"{key}.weight"] + w[f"{key}.bias"]

    x = linear(patches.reshape(R, -1, C * p * p), "patch_embedding.proj")
    token = w["patch_embedding.cls_embedding"]
    x = np.concatenate([np.broadcast_to(token, (R, 1, x.shape[-1])), x], 1)
    x = x + w["patch_embedding.position_embedding.weight"]
    for i in range(v["num_hidden_layers"]):
        key = f"transformer.layers.{i}"
        q, k, v_ = np.split(linear(x, f"{key}.attention.query_key_value"), 3, -1)
        q, k, v_ = (a.reshape(R, x.shape[1], N, -1).swapaxes(1, 2) for a in (q, k, v_))
        attention = jax.nn.softmax(q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1]))
        y = (attention @ v_).swapaxes(1, 2).reshape(x.shape)
        x = x + norm(linear(y, f"{key}.attention.dense"), f"{key}.input_layernorm")
        y = jax.nn.gelu(linear(x, f"{key}.mlp.fc1"), approximate=False)
        x = x + norm(linear(y, f"{key}.mlp.fc2"), f"{key}.post_attention_layernorm")
    return np.asarray(x)


def test_conv_glu_of_glm4v():
    golden = Golden("glm4v")
    scaling = golden.config["vision"]["scaling_factor"]
    cfg = ConvGLUConfig(hidden=golden.config["ffn_hidden_size"], conv="out", scaling=scaling)
    _conv_glu(golden, cfg, golden.weights, "vision.", _eva_tower(golden))


def _visible(side, width, height):
    """bool[side, side]: what of a square map is picture; as the original rounds it."""
    seen = np.ones((side, side), bool)
    scale = side / max(width, height)
    pad_rows = (side - int(height * scale)) // 2
    pad_columns = (side - int(width * scale)) // 2
    seen[: max(pad_rows, 0)] = seen[side - pad_rows :] = False
    seen[:, : max(pad_columns, 0)] = seen[:, side - pad_columns :] = False
    return seen


def test_sva():
    golden, c = Golden("sva"), Golden("sva").config
    cfg = SVAConfig(
        side=c["query_side"],
        windows=tuple(c["windows"]),
        width=c["vision_hidden_size"],
        heads=c["num_heads"],
        layers=c["connector_depth"],
    )
    D, weights = c["llm_hidden"], golden.weights
    sva = golden_connector("sva", cfg, tuple(c["tower_channels"]), D, "cambrian", weights)
    x, mask = [], []
    for k, side in enumerate(c["tower_sides"]):
        index = np.repeat(cells(side, side, cfg.side), 3, 0)
        seen = np.stack([_visible(side, *size) for size in golden["in/image_sizes"]])
        seen = np.take_along_axis(seen.reshape(3, 1, -1), index, 2)
        f, m = units.gather(golden[f"in/tower_{k}"], np.where(seen, index, -2 - index))
        x.append(f)
        mask.append(m)
    sources = run(sva, x, mask, call="sources")
    for k, m in enumerate(sources.masks):
        np.testing.assert_array_equal(m.reshape(-1, m.shape[-1]), golden[f"out/mask_{k}"])
    queries = run(sva, sources, call="aggregate")
    golden.close("queries", queries[:, 0])
    _check_embeds(golden, flat(run(sva.out, queries)), sva.specials()[0])
    _check_block(golden, cfg, sources)


def _positions(golden):
    """For each image, {position in the sequence: query} and positions of newlines."""
    side, start, found = golden.config["query_side"], golden.config["image_position"], []
    for rows, columns in golden["out/grid_after_unpad"]:
        top, left = (side - rows) // 2, (side - columns) // 2
        place, lines, at = {}, [], start
        for r in range(rows):
            for q in range(columns):
                place[at + q] = (top + r) * side + left + q
            lines.append(at + columns)
            at += columns + 1
        found.append((place, lines))
    return found


def _check_embeds(golden, tokens, newline):
    ours = golden["out/inputs_embeds"].copy()
    for row, (place, lines) in enumerate(_positions(golden)):
        ours[row, list(place)] = tokens[row, list(place.values())]
        ours[row, lines] = newline
    golden.close("inputs_embeds", ours)


def _check_block(golden, cfg, sources):
    """The block between decoder layers; queries outside the unpadded grid do not exist there."""
    entries = tables.sva_block(cfg.windows)
    width = golden.config["llm_hidden"]
    abstract = jax.eval_shape(
        lambda: jax.vmap(lambda k: SVABlock(cfg, width, rngs=nnx.Rngs(k)))(
            jax.random.split(jax.random.key(0), 1)
        )
    )
    graphdef, params = unbind(abstract)
    shapes = {p: x.shape for p, x in flatten(params).items()}
    table = tables.block_rows(entries, shapes, "vision_sampler_layers.{}.layers.0.", "")
    assert {row.path: row.shape for row in table} == shapes
    params = table_of_keys.load(table, golden.weights)
    block = bind(graphdef, jax.tree.map(lambda p: jnp.asarray(p[0]), params))
    ours, x = golden["in/hidden"].copy(), golden["in/hidden"]
    queries = np.zeros((3, 1, cfg.tokens, width), np.float32)
    for row, (place, _) in enumerate(_positions(golden)):
        queries[row, 0, list(place.values())] = x[row, list(place)]
    after = np.asarray(run(block, queries, sources))
    for row, (place, _) in enumerate(_positions(golden)):
        ours[row, list(place)] = after[row, 0, list(place.values())]
    golden.close("hidden", ours)


def test_parameter_counts():
    """Full sizes, against official numbers; what they count and we compute is added."""

    def count(*args):
        leaves = flatten(unbind(tables.abstract(*args))[1]).values()
        return sum(math.prod(x.shape) for x in leaves)

    # 360VL keeps a position for a class token that is gone.
    assert count("c_abstractor", CAbstractorConfig(), (1024,), 4096) + 1024 == 37_399_040
    # MiniCPM-V 2.0 stores the positions of its queries.
    of_queries = 64 * 2304
    cfg = ResamplerConfig(64, 18, "sincos")
    assert count("resampler", cfg, (1152,), 2304) + of_queries == 29_514_240
    assert count("resampler", ResamplerConfig(96), (1152,), 4096) == 89_038_848
    for widths, millions in (
        ((3200, 6144), 116.43),
        ((3200, 7168), 143.17),
        ((1024, 2048), 12.60),
        ((1024, 3072), 22.03),
    ):
        number = count("mlp", MLPConfig(window=2, norm="layer"), widths[:1], widths[1])
        assert round(number / 1e6, 2) == millions
    sva = tables.abstract("sva", SVAConfig(), (1152, 1024, 1536, 5760), 4096)
    blocks = flatten(unbind(sva.blocks)[1]).values()
    assert sum(math.prod(x.shape) for x in blocks) == 47_296_512
    block = jax.eval_shape(lambda: SVABlock(SVAConfig(), 4096, rngs=nnx.Rngs(0)))
    assert sum(math.prod(x.shape) for x in flatten(unbind(block)[1]).values()) == 22_056_960
