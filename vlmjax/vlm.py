"""The vision-language model: encode, connect, place, decode.

    visual = model.encode(batch)                  towers over packed patches, connector: [B, V, D]
    x = model.embed(batch, visual)                put where the text left room: [B, T, D]
    hidden, _ = model.decode(x, batch, visual)    decoder over packed rows: [B, T, D]

Everything that decides a shape has happened on the host (`batch.Batch`); here are only fixed
shapes and gathers inside a row.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vlmjax.batch import Form
from vlmjax.connectors import module_of, units
from vlmjax.connectors.sva import SVABlock, SVAConfig
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.llm.decoder import Decoder, DecoderConfig
from vlmjax.nn import bind, unbind
from vlmjax.sharding import layout_of
from vlmjax.vision.convnext import ConvNeXt, ConvNeXtConfig
from vlmjax.vision.vit import ViT, ViTConfig

__all__ = ["VLM", "Compute", "VLMConfig", "Visual", "bind", "place_tokens", "unbind"]


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


TOWERS = {ViTConfig: ViT, ConvNeXtConfig: ConvNeXt}
POOLS = ("none", "max", "weighted")


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """A model: its three parts, and how to compute it. Without vision it is a decoder alone.

    Attributes:
      vision: of the encoder; a tuple of several (Cambrian-1), which are `vision`, `vision_2`, ...
        among the parameters.
      connector: a config of one of `connectors.CONNECTORS`.
      llm: of the decoder. Its extra blocks are those of an SVA connector.
      compute: how to compute it.
      sources: the encoder that each source of the connector reads; () = each encoder once.
      pool: of visual tokens after the connector, one of `POOLS`.
    """

    vision: object
    connector: object
    llm: DecoderConfig
    compute: Compute = Compute()
    sources: tuple = ()
    pool: str = "none"

    def __post_init__(self):
        if self.pool not in POOLS:
            raise ValueError(f"model pool={self.pool!r} is unknown; choose one of {POOLS}")
        if any(e not in range(len(self.encoders)) for e in self.sources):
            raise ValueError(
                f"model sources={self.sources} name an encoder that is not there; there are "
                f"{len(self.encoders)}, counted from 0"
            )
        if self.llm.extra_num and not isinstance(self.connector, SVAConfig):
            raise ValueError(
                f"llm.extra_num={self.llm.extra_num} with a connector that is no SVA: the extra "
                "blocks read the features that an SVA projects; set extra_num=0 or take that "
                "connector"
            )

    @property
    def encoders(self):
        """The configs of the encoders by the name of their parameters."""
        towers = self.vision if isinstance(self.vision, tuple) else (self.vision,)
        names = ("vision" if i == 0 else f"vision_{i + 1}" for i in range(len(towers)))
        return {} if self.vision is None else dict(zip(names, towers, strict=True))

    @property
    def form(self):
        """The `batch.Form` of its batches."""
        towers = [tower.form for tower in self.encoders.values()]
        if not towers:
            return Form()
        sources = self.sources or tuple(range(len(towers)))
        n, tokens = len(sources), self.connector.tokens
        copies = len(getattr(self.connector, "copies", ())) > 1
        groups = [((k,), tokens) for k in range(n)] if copies else [(tuple(range(n)), tokens)]
        routed = "expert" if self.llm.expert != "none" else "none"
        return Form(
            towers=tuple(towers),
            encoders=sources,
            weighted=getattr(self.connector, "reduce", "") == "weighted",
            unit=self.connector.unit,
            groups=tuple(groups),
            specials=self.connector.specials,
            pool=self.pool,
            routed="queries" if self.llm.extra_num else routed,
        )


class Visual(NamedTuple):
    """What the decoder gets to see: tokens and special vectors [B, V, D], and what SVA reads."""

    tokens: jax.Array
    sources: Any = None


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
    """Vision towers, connector and decoder under `vision`, `connector`, `llm`."""

    def __init__(self, cfg, *, rngs):
        self.cfg, extra = cfg, None
        for name, tower in cfg.encoders.items():
            setattr(self, name, TOWERS[type(tower)](tower, rngs=rngs))
        if cfg.encoders:
            towers = list(cfg.encoders.values())
            widths = tuple(towers[e].out_width for e in cfg.form.encoders)
            connector = module_of(cfg.connector)
            self.connector = connector(cfg.connector, widths, cfg.llm.width, rngs=rngs)
        if cfg.llm.extra_num:
            extra = functools.partial(_sva_block, cfg.connector, cfg.llm.width)
        self.llm = Decoder(cfg.llm, rngs=rngs, extra=extra)

    def encode(self, batch):
        """Returns `Visual`: only the units that were kept reach the connector."""
        features = [self.see(i, patches) for i, patches in enumerate(batch.patches)]
        with jax.named_scope("connector"):
            chosen = self.cfg.form.encoders
            gathered = [
                units.gather(features[e], u.index) for e, u in zip(chosen, batch.units, strict=True)
            ]
            x, mask = zip(*gathered, strict=True)
            size, weights = batch.units[0].size, tuple(u.weights for u in batch.units)
            weights = None if weights[0] is None else weights
            extra = self.cfg.llm.extra_num
            sources = self.connector.sources(x, mask, weights) if extra else None
            visual = self.connector(x, mask, size, weights)
            visual = visual.reshape(len(visual), -1, visual.shape[-1])
            if batch.pool is not None:
                visual = units.pool(visual, batch.pool.index, batch.pool.weights, self.cfg.pool)
            specials = self.connector.specials(visual.dtype)
            if len(specials):
                specials = jnp.broadcast_to(specials, (len(visual), *specials.shape))
                visual = jnp.concatenate([visual, specials], 1)
            return Visual(layout_of("llm", *batch.tokens.shape).whole_rows(visual), sources)

    def see(self, encoder, patches):
        """Returns the features [B, P, C] of one encoder, each row with the devices that need it."""
        c, name = self.cfg.compute, list(self.cfg.encoders)[encoder]
        spec = AttentionSpec(c.attention, c.vision_block, c.vision_segment)
        how = dict(dtype=jnp.dtype(c.dtype), attention=spec, remat=c.vision_remat or c.remat)
        with jax.named_scope("vision"):
            features = getattr(self, name)(patches, **how)
        with jax.named_scope("connector"):
            # What a row needs is brought to its devices here, and only here.
            return layout_of("vision", *features.shape[:2], "whole").whole_rows(features)

    def embed(self, batch, visual):
        """Returns decoder inputs [B, T, D]; visual is None for a text-only batch."""
        text = self.llm.embed(batch.tokens, jnp.dtype(self.cfg.compute.dtype))
        return text if visual is None else place_tokens(text, visual.tokens, batch.source)

    def decode(self, x, batch, visual=None, cache=None):
        """Returns (hidden states [B, T, D] of packed rows, the cache filled with them)."""
        c, extra = self.cfg.compute, None
        spec = AttentionSpec(c.attention, c.llm_block, c.llm_segment)
        if visual is not None and visual.sources is not None:
            extra = functools.partial(_aggregate, visual.sources, batch.routed)
        routed = batch.routed if self.cfg.llm.expert != "none" else None
        how = dict(routed=routed, extra=extra, attention=spec, remat=c.remat)
        with jax.named_scope("llm"):
            return self.llm(x, batch.positions, batch.segments, cache=cache, **how)

    def __call__(self, batch):
        """Returns hidden states [B, T, D]; a batch without patch slots runs no vision tower."""
        return self.prefill(batch)[0]

    def prefill(self, batch, cache=None):
        """Returns (hidden states [B, T, D], the cache filled with the one sample of each row)."""
        visual = self.encode(batch) if batch.has_vision else None
        return self.decode(self.embed(batch, visual), batch, visual, cache)

    def logits(self, batch):
        """Returns f32[B, T, V] at every position; training uses `kernels.cross_entropy` instead."""
        return self.llm.logits(self(batch))


def _sva_block(cfg, width, rngs):
    return SVABlock(cfg, width, rngs=rngs)


def _aggregate(sources, routed, block, x):
    """Returns x [B, T, D] in which the visual tokens have read the towers once more."""
    B, I, Q = sources.masks[0].shape[:3]
    queries = jnp.take_along_axis(x, jnp.maximum(routed.slots, 0)[..., None], axis=1)
    new = block(queries.reshape(B, I, Q, -1), sources).reshape(queries.shape)
    return place_tokens(x, new, routed.index)
