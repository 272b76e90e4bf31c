"""The vision-language model: encode, connect, place, decode.

    visual = model.encode(batch)            ViT over packed patches, averaged, connector: [B, U, D]
    x = model.embed(batch, visual)          visual tokens put where the text left room: [B, T, D]
    hidden = model.decode(x, batch)         decoder over packed rows: [B, T, D]

Everything that decides a shape has happened on the host (`batch.Batch`); here are only fixed
shapes and gathers inside a row.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vlmjax.connectors import units
from vlmjax.connectors.mlp import MLP, MLPConfig
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.llm.decoder import Decoder, DecoderConfig
from vlmjax.nn import bind, unbind
from vlmjax.sharding import layout_of
from vlmjax.vision.vit import ViT, ViTConfig

__all__ = ["VLM", "Compute", "VLMConfig", "bind", "place_tokens", "unbind"]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to compute, without changing what: the same weights serve any choice.

    Attributes:
      dtype: of activations, "float32" or "bfloat16"; norms, softmax and loss stay f32.
      remat: policy of the backward pass, a key of `nn.REMAT`.
      vision_remat: that of the vision tower where it differs; "" = `remat`.
      attention: kind of `kernels.attention.api.AttentionSpec`.
      vision_block, llm_block: its block sizes; 0 = the best known ones.
      vision_segment, llm_segment: expected patches of an image and tokens of a sample; only the
        compiler's cost estimates and `aot` read them. 0 = a whole row.
      loss_chunk: supervised tokens whose logits exist at a time; 0 = all.
      loss_columns: of the vocabulary that exist at a time.
    """

    dtype: str = "float32"
    remat: str = "none"
    vision_remat: str = ""
    attention: str = "auto"
    vision_block: int = 0
    llm_block: int = 0
    vision_segment: int = 0
    llm_segment: int = 0
    loss_chunk: int = 1024
    loss_columns: int = 8192


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """A model: its three parts, and how to compute it. Without vision it is a decoder alone."""

    vision: ViTConfig | None
    connector: MLPConfig | None
    llm: DecoderConfig
    compute: Compute = Compute()

    @property
    def patch_dim(self):
        """Values in a patch row of a batch."""
        return self.vision.patch_dim if self.vision else 0


def place_tokens(text, visual, source):
    """Returns [B, T, D]: visual tokens where the text left room for them.

    Args:
      text: [B, T, D] embedded tokens, arbitrary at visual slots.
      visual: [B, U, D].
      source: i32[B, T] index into U, or -1 for text.
    """
    picked = jnp.take_along_axis(visual, jnp.maximum(source, 0)[..., None], axis=1)
    return jnp.where((source >= 0)[..., None], picked, text)


class VLM(nnx.Module):
    """Vision tower, connector and decoder under `vision`, `connector`, `llm`."""

    def __init__(self, cfg, *, rngs):
        self.cfg = cfg
        if cfg.vision is not None:
            self.vision = ViT(cfg.vision, rngs=rngs)
            self.connector = MLP(cfg.connector, (cfg.vision.width,), cfg.llm.width, rngs=rngs)
        self.llm = Decoder(cfg.llm, rngs=rngs)

    def encode(self, batch):
        """Returns visual tokens [B, U, D]: only the windows that were kept reach the connector."""
        c = self.cfg.compute
        with jax.named_scope("vision"):
            features = self.vision(
                Patches(batch.patches, batch.patch_segments, batch.patch_coords),
                dtype=jnp.dtype(c.dtype),
                attention=AttentionSpec(c.attention, c.vision_block, c.vision_segment),
                remat=c.vision_remat or c.remat,
            )
        with jax.named_scope("connector"):
            # What a row needs is brought to its devices here, and only here.
            features = layout_of("vision", *features.shape[:2]).whole_rows(features)
            x, mask = units.gather(features, batch.windows)
            visual = self.connector((x,), (mask,))
            visual = visual.reshape(len(visual), -1, visual.shape[-1])
            return layout_of("llm", *batch.tokens.shape).whole_rows(visual)

    def embed(self, batch, visual):
        """Returns decoder inputs [B, T, D]; visual is None for a text-only batch."""
        text = self.llm.embed(batch.tokens, jnp.dtype(self.cfg.compute.dtype))
        return text if visual is None else place_tokens(text, visual, batch.source)

    def decode(self, x, batch):
        """Returns hidden states [B, T, D] of packed rows."""
        c = self.cfg.compute
        spec = AttentionSpec(c.attention, c.llm_block, c.llm_segment)
        with jax.named_scope("llm"):
            return self.llm(x, batch.positions, batch.segments, attention=spec, remat=c.remat)[0]

    def __call__(self, batch):
        """Returns hidden states [B, T, D]; a batch without patch slots runs no vision tower."""
        visual = self.encode(batch) if batch.patches.shape[1] else None
        return self.decode(self.embed(batch, visual), batch)

    def logits(self, batch):
        """Returns f32[B, T, V] at every position; training uses `kernels.cross_entropy` instead."""
        return self.llm.logits(self(batch))
