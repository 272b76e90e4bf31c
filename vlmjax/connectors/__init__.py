"""Connectors: from the features of units of patches to tokens of the decoder.

A connector is a frozen config and an nnx module

    module = Module(cfg, in_widths, out_width, rngs=rngs)
    tokens = module(x, mask, size, weights)      [B, U, n, D]

with, for each source k (a tower, a scale, a group of units), gathered features x[k] of shape
[B, U, G_k, C_k] and mask[k] bool[B, U, G_k], True = may be seen. size i32[B, U, 2] are rows and
columns of a unit, weights[k] f32[B, U, G_k] those of "weighted" sums. A unit with nothing to see
gives something finite. `module.specials(dtype)` [len(cfg.specials), D] are the learned vectors of
token formats.
The host reads of a config `tokens` (n), `unit` (a `batch.UnitRule`) and `specials` (names).
"""

from vlmjax.connectors.c_abstractor import CAbstractor, CAbstractorConfig
from vlmjax.connectors.conv_glu import ConvGLU, ConvGLUConfig
from vlmjax.connectors.mlp import MLP, MLPConfig
from vlmjax.connectors.perceiver import Perceiver, PerceiverConfig
from vlmjax.connectors.qformer import QFormer, QFormerConfig
from vlmjax.connectors.resampler import Resampler, ResamplerConfig
from vlmjax.connectors.sva import SVA, SVAConfig

CONNECTORS = {
    "mlp": (MLPConfig, MLP),
    "c_abstractor": (CAbstractorConfig, CAbstractor),
    "resampler": (ResamplerConfig, Resampler),
    "perceiver": (PerceiverConfig, Perceiver),
    "qformer": (QFormerConfig, QFormer),
    "sva": (SVAConfig, SVA),
    "conv_glu": (ConvGLUConfig, ConvGLU),
}


def module_of(cfg):
    """Returns the module of a config."""
    return dict(CONNECTORS.values())[type(cfg)]
