"""Where each parameter of a connector lies in a checkpoint, in the form of `hf/table.py`.

Keys are relative to the connector's own prefix, which `rows` is given, and paths to the connector.
An entry without a path is what the checkpoint holds and nothing reads: zeros where we write it.
The sizes of axis letters come from our leaves; layers may be counted from any number in any step.
"""

from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx

from vlmjax.connectors import CONNECTORS
from vlmjax.connectors.resampler import sincos_table
from vlmjax.hf.table import Row
from vlmjax.nn import flatten, unbind

LINEAR, HEADS, MERGE = "D I -> I D", "(N H) D -> D N H", "D (N H) -> N H D"


def _both(path, key, kernel="", bias="D -> D"):
    """Entries of weight and bias, of a norm if there is no `kernel`."""
    key = f"{key}." if key else ""
    leaf, kernel = ("kernel", kernel) if kernel else ("scale", "D -> D")
    return ((f"{path}/{leaf}", f"{key}weight", kernel), (f"{path}/bias", f"{key}bias", bias))


def _at(path, key, entries):
    """The entries under a path and a key."""
    return tuple((path + p if p else p, key + k, axes) for p, k, axes in entries)


def _sequence(module, start=0):
    """Entries of `norm_i` and `dense_i` numbered as torch.nn.Sequential counts, activations too.

    A single linear map has no number.
    """
    if not hasattr(module, "dense_1") and not hasattr(module, "norm_0"):
        return _both("dense_0", "", LINEAR)
    entries, i, at = (), 0, start
    while hasattr(module, f"dense_{i}"):
        if hasattr(module, f"norm_{i}"):
            entries, at = entries + _both(f"norm_{i}", f"{at}"), at + 1
        entries, at, i = entries + _both(f"dense_{i}", f"{at}", LINEAR), at + 2, i + 1
    return entries


def _named(module, norm="layer_norm"):
    """Entries of `norm_0`, `dense_0`, `dense_1` as transformers names them."""
    entries = _both("norm_0", norm) if hasattr(module, "norm_0") else ()
    return entries + tuple(
        entry for i in (0, 1) for entry in _both(f"dense_{i}", f"linear_{i + 1}", LINEAR)
    )


RESAMPLER = (  # torch.nn.MultiheadAttention keeps q, k and v in one tensor
    ("query/embedding", "query", "Q D -> Q D"),
    ("kv/kernel", "kv_proj.weight", LINEAR),
    *_both("q_norm", "ln_q"),
    *_both("kv_norm", "ln_kv"),
    *_both("norm", "ln_post"),
    ("out/kernel", "proj", "I D -> I D"),
    *(
        entry
        for name, part in (("q", "[N]+N+N"), ("k", "N+[N]+N"), ("v", "N+N+[N]"))
        for entry in (
            (f"attn/{name}/kernel", "attn.in_proj_weight", f"({part} H) D -> D N H"),
            (f"attn/{name}/bias", "attn.in_proj_bias", f"({part} H) -> N H"),
        )
    ),
    *_both("attn/o", "attn.out_proj", MERGE),
)
PERCEIVER = (  # Idefics2
    ("project/gate/kernel", "modality_projection.gate_proj.weight", "M I -> I M"),
    ("project/up/kernel", "modality_projection.up_proj.weight", "M I -> I M"),
    ("project/down/kernel", "modality_projection.down_proj.weight", "D M -> M D"),
    ("query/embedding", "perceiver_resampler.latents", "Q D -> Q D"),
    ("norm/scale", "perceiver_resampler.norm.weight", "D -> D"),
    *_at(
        "blocks/",
        "perceiver_resampler.layers.{}.",
        (
            ("attn_norm/scale", "input_latents_norm.weight", "D -> D"),
            ("context_norm/scale", "input_context_norm.weight", "D -> D"),
            ("mlp_norm/scale", "post_attention_layernorm.weight", "D -> D"),
            *((f"attn/{x}/kernel", f"self_attn.{x}_proj.weight", HEADS) for x in "qkv"),
            ("attn/o/kernel", "self_attn.o_proj.weight", MERGE),
            ("mlp/gate/kernel", "mlp.gate_proj.weight", "M D -> D M"),
            ("mlp/up/kernel", "mlp.up_proj.weight", "M D -> D M"),
            ("mlp/down/kernel", "mlp.down_proj.weight", "D M -> M D"),
        ),
    ),
)
QLLAMA = (
    ("query/embedding", "query_tokens", "1 Q D -> Q D"),
    ("norm/scale", "qllama.model.norm.weight", "D -> D"),
    *_at(
        "blocks/",
        "qllama.model.layers.{}.",
        (
            ("attn_norm/scale", "input_layernorm.weight", "D -> D"),
            ("mlp_norm/scale", "post_attention_layernorm.weight", "D -> D"),
            *((f"attn/{x}/kernel", f"self_attn.{x}_proj.weight", HEADS) for x in "qkv"),
            ("attn/o/kernel", "self_attn.o_proj.weight", MERGE),
            ("mlp/gate/kernel", "mlp.gate_proj.weight", "M D -> D M"),
            ("mlp/up/kernel", "mlp.up_proj.weight", "M D -> D M"),
            ("mlp/down/kernel", "mlp.down_proj.weight", "D M -> M D"),
        ),
    ),
    *_at(
        "cross/",
        "qllama.model.layers.{}.cross_attn.",
        (
            ("q_norm/scale", "norm1.weight", "D -> D"),
            ("kv_norm/scale", "norm2.weight", "D -> D"),
            *((f"attn/{x}/kernel", f"{x}_proj.weight", HEADS) for x in "qkv"),
            ("attn/o/kernel", "o_proj.weight", MERGE),
        ),
    ),
)
ATTENTION_POOL = (  # clip_projector and clip_projector2 of InternVL 1.0
    *(
        entry
        for x in "qkv"
        for entry in (
            *_both(f"{x}_norm", f"norm1_{x}"),
            (f"attn/{x}/kernel", f"cross_attn.{x}.weight", HEADS),
            (f"attn/{x}/bias", f"cross_attn.{x}_bias", "(N H) -> N H"),
        )
    ),
    *_both("attn/o", "cross_attn.proj", MERGE),
)
CONV_GLU = (  # CogVLM2, GLM-4V
    *_both("conv", "conv", "D C p q -> (p q C) D"),
    ("dense/kernel", "linear_proj.linear_proj.weight", LINEAR),
    *_both("norm", "linear_proj.norm1"),
    ("mlp/gate/kernel", "linear_proj.gate_proj.weight", "M D -> D M"),
    ("mlp/up/kernel", "linear_proj.dense_h_to_4h.weight", "M D -> D M"),
    ("mlp/down/kernel", "linear_proj.dense_4h_to_h.weight", "D M -> M D"),
    ("specials/boi/embedding", "boi", "1 1 D -> D"),
    ("specials/eoi/embedding", "eoi", "1 1 D -> D"),
)
CONV1X1 = "D I 1 1 -> I D"
_BLOCK = (
    ("enter/kernel", "conv1.conv.weight", CONV1X1),
    *_both("enter_norm", "conv1.bn"),
    ("conv/kernel", "conv2.conv.weight", "D 1 h w -> h w D"),
    *_both("conv_norm", "conv2.bn"),
    *_both("squeeze", "se.fc1", CONV1X1),
    *_both("excite", "se.fc2", CONV1X1),
    ("leave/kernel", "conv3.conv.weight", CONV1X1),
    *_both("leave_norm", "conv3.bn"),
)
_SKIP = (
    ("skip/kernel", "downsample.conv.weight", CONV1X1),
    *_both("skip_norm", "downsample.bn"),
)
# pos_emb of 360VL has a row for the class token that is gone; that of Honeybee has not.
POSITIONS = {
    "360vl": (
        ("", "pos_emb", "1 [1]+S D -> D"),
        ("pos/embedding", "pos_emb", "1 1+[S] D -> S D"),
    ),
    "honeybee": (("pos/embedding", "pos_emb", "1 S D -> S D"),),
}


def _abstractor(copy, layout):
    """Entries of one C-Abstractor, and the numbers of its stacked layers by path."""
    entries, numbers = POSITIONS[layout], {}
    for name, stage in (("before", "net.0.b"), ("after", "net.2.b")):
        first = hasattr(getattr(copy, name), "first")
        if first:
            entries += _at(f"{name}/first/", f"{stage}1.", _BLOCK + _SKIP)
        entries += _at(f"{name}/blocks/", f"{stage}{{}}.", _BLOCK)
        numbers[f"{name}/"] = (1 + first, 1)
    entries += _at("readout/", "readout.", _sequence(copy.readout))
    if hasattr(copy, "norm"):
        entries += _both("norm", "prenorm")
    if hasattr(copy, "eos"):
        entries += (("eos/embedding", "eos_tokens", "1 n D -> n D"),)
    return entries, numbers


def sva_block(windows):
    """Entries of an `SVABlock`, of the connector or between decoder layers."""
    entries = [
        ("context/kernel", "proj_context.weight", LINEAR),
        ("enter/kernel", "proj_in.weight", LINEAR),
        ("up/kernel", "proj_out.linear_1.weight", LINEAR),
        ("down/kernel", "proj_out.linear_2.weight", LINEAR),
        *_both("norm", "norm"),
        ("attn/o/kernel", "cross_attn.o_proj.weight", MERGE),
        *_sva_head("q", "q_proj"),
    ]
    for k, side in enumerate(windows):
        entries += _sva_head(f"k_{k}", f"k_proj_{k}") + _sva_head(f"v_{k}", f"v_proj_{k}")
        if side > 1:
            entries.append((f"pos_{k}/embedding", f"pos_embed_{k}", "S D -> S D"))
    return tuple(entries)


def _sva_head(name, key):
    path = f"attn/{name}"
    return [
        *_both(f"{path}_norm", f"cross_attn.{key}.0"),
        (f"{path}/kernel", f"cross_attn.{key}.1.weight", HEADS),
    ]


def _sva(module):
    entries = (
        ("query/embedding", "vision_query", "1 D -> 1 D"),
        *_at("blocks/", "vision_sampler_0.layers.{}.", sva_block(module.cfg.windows)),
        *_at("out/", "mm_projector.", _sequence(module.out)),
        ("specials/newline/embedding", "image_newline", "D -> D"),
    )
    for k in range(len(module.cfg.windows)):
        key = f"mm_projector_aux_{k}."
        entries += _at(f"tower_{k}/proj/", key, _sequence(getattr(module, f"tower_{k}").proj))
        entries += _both(f"tower_{k}/norm", f"{key}3")
    return entries


# Layout -> function of the module returning entries and the numbers of stacked layers: where they
# begin and in which step, by the beginning of the path.
LAYOUTS = {
    "llava": lambda m: (_named(m, "projector_layernorm"), {}),
    "llava_original": lambda m: (_sequence(m), {}),
    "videollama3": lambda m: (_at("", "readout.", _sequence(m)), {}),
    "internvl": lambda m: (_sequence(m), {}),  # mlp1
    "internvl_transformers": lambda m: (_named(m), {}),
    "vila": lambda m: (_sequence(m, start=int(m.cfg.window > 1)), {}),  # 0 is the downsampling
    "resampler": lambda m: (RESAMPLER, {}),
    "idefics2": lambda m: (PERCEIVER, {}),
    "qllama": lambda m: (QLLAMA, {"cross/": (0, m.cfg.every)}),
    "attention_pool": lambda m: (ATTENTION_POOL, {}),
    "conv_glu": lambda m: (CONV_GLU, {}),
    "cambrian": lambda m: (_sva(m), {}),
    "360vl": lambda m: _abstractor(m, "360vl"),
    "honeybee": lambda m: _abstractor(m, "honeybee"),
}


def rows(
    module: nnx.Module,
    layout: str,
    key: str = "",
    path: str = "connector/",
    extra: Iterable[tuple[str, str, str]] = (),
) -> list[Row]:
    """The table of one module.

    Args:
      module: a connector, a copy of a `CAbstractor` or an `AttentionPool`; may be abstract.
      layout: a key of `LAYOUTS`.
      key: prefix of the keys in the checkpoint.
      path: prefix of our paths.
      extra: entries with full keys for leaves the layout keeps outside the connector, such as
        ("specials/newline/embedding", "image_newline", "D -> D").
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown connector layout {layout!r}; choose one of {sorted(LAYOUTS)}")
    entries, numbers = LAYOUTS[layout](module)
    shapes = {p: x.shape for p, x in flatten(unbind(module)[1]).items()}
    table = [(p, key + k, axes) for p, k, axes in entries] + [*extra]
    table = [entry for entry in table if entry[0] in shapes or not entry[0]]
    if lost := sorted(set(shapes) - {p for p, _, _ in table}):
        raise ValueError(
            f"the layout {layout!r} does not hold {', '.join(lost)} of {module.cfg}; choose the "
            "layout of that connector, or give the keys as `extra`"
        )
    return _rows(table, shapes, numbers, path, getattr(module, "cfg", None))


def block_rows(entries, shapes, key, path):
    """The table of stacked blocks, such as `sva_block(windows)` between decoder layers.

    Args:
      entries: of one block.
      shapes: path -> shape of the stacked leaves.
      key: prefix of the keys, with `{}` for the number of the block.
      path: prefix of our paths.
    """
    return _rows([(p, key + k, axes) for p, k, axes in entries], shapes, {}, path, None)


def _rows(table, shapes, numbers, path, cfg) -> list[Row]:
    made, side = [], getattr(cfg, "window", 1)
    for ours, theirs, axes in table:
        stacked = "{}" in theirs
        shape = shapes[ours][stacked:] if ours else shapes["pos/embedding"][1:]
        target = axes.split("->")[1].split()
        if target[0].startswith("("):
            sizes = {"p": side, "q": side, "C": shape[0] // side**2, "D": shape[1]}
        else:
            sizes = dict(zip(target, shape, strict=True))
        if not ours:
            sizes["S"] = shapes["pos/embedding"][0]
        start, step = next((n for p, n in numbers.items() if ours.startswith(p)), (0, 1))
        count = shapes[ours][0] if stacked else 1
        keys = tuple(theirs.format(start + step * i) for i in range(count))
        made.append(Row(path + ours if ours else "", keys, stacked, axes, sizes))
    return made


def constants(cfg, out_width: int) -> dict[str, np.ndarray]:
    """Tensors by key that a checkpoint stores and our module computes."""
    if getattr(cfg, "query_pos", "none") == "sincos":
        return {"pos_embed": sincos_table(cfg.queries, out_width)}
    return {}


def abstract(type_name, cfg, in_widths, out_width):
    """The connector of a config without arrays, for `rows`."""
    make = CONNECTORS[type_name][1]
    return jax.eval_shape(lambda: make(cfg, in_widths, out_width, rngs=nnx.Rngs(0)))
