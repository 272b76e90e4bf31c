"""What the parts of a model cost forward: FLOPs, 2 for each weight and vector it multiplies.

Counted are products with weights, convolutions among them, and those of attention. Nothing are
biases, norms, activations, sums, learned vectors, fixed multipliers, and the resampling of maps and
of position tables.
"""

from typing import NamedTuple

from vlmjax import connectors as c
from vlmjax.vision.convnext import ConvNeXtConfig
from vlmjax.vision.vit import ViTConfig


class Cost(NamedTuple):
    """FLOPs of products with weights, of the first among them, of attention.

    The first are those that read the input itself: no gradient passes through them to something
    trained unless that comes before the part.
    """

    weights: int
    first: int = 0
    attention: int = 0


def dense(*widths):
    """Returns the weights of linear maps from each width to the next."""
    return sum(a * b for a, b in zip(widths, widths[1:], strict=False))


def _vit(cfg, patches, pairs):
    embed, matrices = cfg.patch_dim * cfg.width, 3 if cfg.gated else 2
    block = 4 * cfg.width**2 + matrices * cfg.width * cfg.mlp
    weights = 2 * patches * (embed + cfg.blocks * block)
    return Cost(weights, 2 * patches * embed, 4 * cfg.blocks * cfg.width * pairs)


def _convnext(cfg, patches, pairs):
    stem, before = patches * cfg.patch_dim * cfg.widths[0], 0
    total = stem
    for i, (width, depth) in enumerate(zip(cfg.widths, cfg.depths, strict=True)):
        block = width * (cfg.kernel**2 + 2 * cfg.ratio * width)
        total += patches // 4**i * (4 * before * width + depth * block)
        before = width
    return Cost(2 * total, 2 * stem)


def _mlp(cfg, widths, out, units, features):
    sizes = cfg.window**2 * sum(widths), *cfg.hidden, *(out,) * cfg.layers
    normed = cfg.norm != "none"  # a trained norm stands in front
    return Cost(2 * units[0] * dense(*sizes), 0 if normed else 2 * units[0] * dense(*sizes[:2]))


def _conv_glu(cfg, widths, out, units, features):
    width, places = sum(widths), cfg.window**2
    to = out if cfg.conv == "out" and places > 1 else width
    first = dense(places * width, to) if places > 1 else dense(to, out)
    rest = 3 * dense(out, cfg.hidden) + (dense(to, out) if places > 1 else 0)
    return Cost(2 * units[0] * (first + rest), 2 * units[0] * first)


def _c_abstractor(cfg, widths, out, units, features):
    def stage(width, maps, places):
        """From maps of `width` channels and so many places in all of them."""
        total = 0
        for before in (width, *(cfg.width,) * (cfg.depth - 1)):
            skip = dense(before, cfg.width) if before != cfg.width else 0
            total += places * (dense(before, cfg.width, cfg.width) + skip + 9 * cfg.width)
            total += maps * 2 * cfg.width * round(before / 4)  # squeeze and excitation
        return total

    total = 0
    for width, maps, places in zip(widths, units, features, strict=True):
        cells = maps * cfg.queries
        total += stage(width, maps, places) + stage(cfg.width, maps, cells)
        total += cells * dense(cfg.width, *(out,) * cfg.layers)
    return Cost(2 * total)  # its table of positions comes first, and is trained


def _resampler(cfg, widths, out, units, features):
    first, queries = features[0] * dense(widths[0], out), units[0] * cfg.queries
    total = first + features[0] * 2 * out**2 + queries * 3 * out**2
    return Cost(2 * total, 2 * first, 4 * out * cfg.queries * features[0])


def _perceiver(cfg, widths, out, units, features):
    queries, heads = units[0] * cfg.queries, cfg.heads * cfg.head_dim
    keys, first = features[0] + queries, features[0] * widths[0] * (2 * cfg.hidden or out)
    layer = queries * (2 * dense(out, heads) + 3 * dense(out, cfg.mlp or 4 * out))
    layer += keys * 2 * dense(out, cfg.kv_heads * cfg.head_dim)
    total = first + features[0] * cfg.hidden * out + cfg.layers * layer
    return Cost(2 * total, 2 * first, 4 * cfg.layers * heads * cfg.queries * keys)


def _qformer(cfg, widths, out, units, features):
    queries, crossed = units[0] * cfg.queries, cfg.layers // cfg.every
    layer = 4 * cfg.width**2 + 3 * dense(cfg.width, cfg.mlp)
    total = queries * (cfg.layers * layer + crossed * 2 * cfg.width**2)
    total += crossed * features[0] * 2 * dense(widths[0], cfg.width)
    total += queries * dense(cfg.width, *(out,) * cfg.out_layers)
    read = cfg.layers * queries + crossed * features[0]
    return Cost(2 * total, 0, 4 * cfg.width * cfg.queries * read)  # a trained norm comes first


def _places(cfg, images):
    """Returns what the queries of images read of each tower; sums of features count as one."""
    return [images * cfg.tokens * side**2 for side in cfg.windows]


def sva_block(cfg, width, images):
    """Returns the `Cost` of an SVA block whose queries have a width."""
    D, queries, read = cfg.width, images * cfg.tokens, sum(_places(cfg, images))
    each = dense(width + D, D) + 3 * D**2 + dense(D, width)  # enter; q, o, up; down
    return Cost(2 * (queries * each + images * D**2 + read * 2 * D**2), 0, 4 * D * read)


def _sva(cfg, widths, out, units, features):
    places, block = _places(cfg, units[0]), sva_block(cfg, cfg.width, units[0])
    first = sum(n * dense(width, cfg.width) for n, width in zip(places, widths, strict=True))
    total = first + sum(places) * cfg.width**2
    total += units[0] * cfg.tokens * dense(cfg.width, out, out)
    weights = 2 * total + cfg.layers * block.weights
    return Cost(weights, 2 * first, cfg.layers * block.attention)


TOWERS = {ViTConfig: _vit, ConvNeXtConfig: _convnext}
CONNECTORS = {
    c.MLPConfig: _mlp,
    c.ConvGLUConfig: _conv_glu,
    c.CAbstractorConfig: _c_abstractor,
    c.ResamplerConfig: _resampler,
    c.PerceiverConfig: _perceiver,
    c.QFormerConfig: _qformer,
    c.SVAConfig: _sva,
}


def tower(cfg, patches, pairs):
    """Returns the `Cost` of an encoder.

    Args:
      cfg: its config.
      patches: slots, those of class tokens and registers included.
      pairs: sum over views of the square of that.
    """
    return TOWERS[type(cfg)](cfg, patches, pairs)


def connector(cfg, widths, out, units, features):
    """Returns the `Cost` of a connector.

    Args:
      cfg: its config.
      widths: channels of each source.
      out: width of the decoder.
      units: of each source.
      features: of each source, gathered by its units.
    """
    return CONNECTORS[type(cfg)](cfg, widths, out, units, features)


def decoder(cfg, tokens, pairs):
    """Returns the `Cost` of the blocks of a decoder for such `Stats`."""
    block = cfg.width * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads) + 3 * cfg.width * cfg.mlp
    causal = 2 * cfg.layers * cfg.heads * cfg.head_dim * pairs
    return Cost(2 * tokens * cfg.layers * block, 0, causal)
