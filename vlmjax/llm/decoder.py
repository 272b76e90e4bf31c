"""The decoder of every language model here, by preset. Embeddings in, hidden states out.

The head is applied by the caller. What a model has beyond Llama is a field of `DecoderConfig`:
biases, norms of queries and keys, rotary positions of a part of the head or with scaled
frequencies, fixed multipliers (MiniCPM, Granite), a second set of weights for chosen tokens (the
visual expert of CogVLM), and blocks of another kind after some layers (the SVA of Cambrian).

Source: `modeling_llama.py`, `modeling_qwen2.py`, `modeling_qwen3.py`, `modeling_phi3.py`,
`modeling_glm.py` and `modeling_granite.py` in transformers; arXiv:2311.03079 for the expert,
arXiv:2406.16860 for SVA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmjax.attention import Attention, cached, packed
from vlmjax.llm.expert import Expert, serve
from vlmjax.nn import MLP, Dense, RMSNorm, bind, param, scan_layers, stack, unbind
from vlmjax.rope import angles_1d
from vlmjax.sharding import Layout, layout_of, look_up

CHOICES = {
    "qk_norm": ("none", "head"),
    "rope_factors": ("none", "short", "long"),
    "expert": ("none", "visual"),
    "extra_place": ("layer", "attention"),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder, and what it has beyond Llama.

    Attributes:
      qkv_bias, o_bias, mlp_bias: of the attention's inputs and output and of the MLP.
      tie: uses the embedding as the head.
      qk_norm: "head" normalises the queries and keys of each head.
      rotary: channels of a head that rotate, the first ones; 0 = all.
      rope_scale: positions are divided by it, for longer contexts than those of training.
      rope_short, rope_long: divisors of the frequencies (LongRoPE), up to the context of the
        original training and beyond it.
      rope_factors: which of the two is used; the choice holds for the whole run, whatever the
        length of a sample.
      rope_context: tokens of that original training; only exports name it.
      rope_attention: factor on rotated queries and on rotated keys.
      embed_multiplier: on embedded tokens; not on visual tokens put among them.
      attention_multiplier: on q k^T; 0 = 1 / sqrt(head_dim).
      residual_multiplier: on what attention and MLP add.
      logits_divisor: of the logits.
      expert: "visual" gives each layer a second set of weights for chosen tokens.
      extra_num, extra_start, extra_stride: that many blocks of a kind that the caller makes, after
        the layers extra_start, extra_start + extra_stride, ...
      extra_place: whether these come after the "layer" or inside it, after its "attention".
    """

    vocab: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    eps: float = 1e-6
    qkv_bias: bool = True
    tie: bool = True
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    rotary: int = 0
    rope_scale: float = 1.0
    rope_short: tuple[float, ...] = ()
    rope_long: tuple[float, ...] = ()
    rope_factors: str = "none"
    rope_context: int = 0
    rope_attention: float = 1.0
    embed_multiplier: float = 1.0
    attention_multiplier: float = 0.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    expert: str = "none"
    extra_num: int = 0
    extra_start: int = 0
    extra_stride: int = 1
    extra_place: str = "layer"

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; "
                "grouped-query attention needs that"
            )
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {allowed}"
                )
        if self.head_dim % 2 or self.rotary % 2 or self.rotary > self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} must be even for rotary positions, and "
                f"rotary={self.rotary} even and at most that (0 = all); change them"
            )
        for kind in ("short", "long"):
            given, used = getattr(self, f"rope_{kind}"), kind == self.rope_factors
            if (given or used) and len(given) != self.rotated // 2:
                raise ValueError(
                    f"rope_{kind} has {len(given)} divisors and rope_factors="
                    f"{self.rope_factors!r}; {self.rotated} channels rotate, which needs "
                    f"{self.rotated // 2}; correct it or choose other factors"
                )
        last = self.extra_start + (self.extra_num - 1) * self.extra_stride
        if self.extra_start < 0 or self.extra_stride < 1 or last >= self.layers:
            raise ValueError(
                f"extra_num={self.extra_num}, extra_start={self.extra_start}, "
                f"extra_stride={self.extra_stride}: the last extra block would come after layer "
                f"{last} of {self.layers}; they count from 0 and the stride is at least 1; change "
                "these numbers"
            )

    @property
    def rotated(self):
        """Channels of each head that rotate."""
        return self.rotary or self.head_dim

    def rope_divisors(self):
        """Divisors of the rotary frequencies, None for all 1."""
        chosen = {"short": self.rope_short, "long": self.rope_long}.get(self.rope_factors, (1.0,))
        divisors = np.array(chosen, np.float32) * np.float32(self.rope_scale)
        return None if (divisors == 1).all() else divisors

    def query_scale(self):
        """Factors [H] on the channels of queries beside 1 / sqrt(H), None for all 1."""
        scale = np.full(self.head_dim, (self.attention_multiplier or self.head_dim**-0.5))
        scale *= self.head_dim**0.5
        scale[: self.rotated] *= self.rope_attention**2  # what keys would be multiplied by, too
        return None if np.allclose(scale, 1, rtol=1e-9) else scale.astype(np.float32)


class Embed(nnx.Module):
    """Token table f32[V, D], times `scale` where it is looked up."""

    def __init__(self, vocab, width, *, rngs, scale=1.0):
        # Of the size of what the layers add, also where it is the head of a narrow model.
        self.embedding = param(rngs, (vocab, width), ("vocab", "embed"), fan_in=width)
        self.scale = scale

    def __call__(self, tokens, dtype):
        x = look_up(self.embedding[...], tokens, dtype)
        return x if self.scale == 1 else x * jnp.asarray(self.scale, dtype)


class Block(nnx.Module):
    """Pre-norm layer with gated MLP."""

    def __init__(self, cfg, *, rngs):
        heads = (cfg.heads, cfg.kv_heads, cfg.head_dim)
        make = dict(rngs=rngs, out_scale=(2 * cfg.layers) ** -0.5)
        attn = dict(qkv_bias=cfg.qkv_bias, o_bias=cfg.o_bias, **make)
        if cfg.qk_norm == "head":
            attn |= dict(qk_norm="head", qk_norm_eps=cfg.eps)
        self.attn_norm = RMSNorm(cfg.width, cfg.eps, rngs=rngs)
        self.attn = Attention(cfg.width, *heads, **attn)
        self.mlp_norm = RMSNorm(cfg.width, cfg.eps, rngs=rngs)
        self.mlp = MLP(cfg.width, cfg.mlp, "silu", gated=True, bias=cfg.mlp_bias, **make)
        self.expert = Expert(cfg, **make) if cfg.expert != "none" else None
        self.multiplier = cfg.residual_multiplier

    def add(self, x, y):
        return x + y if self.multiplier == 1 else x + y * jnp.asarray(self.multiplier, y.dtype)

    def __call__(self, x, attend, cache, routed=None, between=None):
        """Returns (x after the layer, what `attend` keeps).

        Args:
          routed: slots and index of `serve`, or None.
          between: function of x, run after attention; None = nothing.
        """
        expert = self.expert if routed is not None else self
        qkv = serve(routed, self.attn.project, expert.attn.project, self.attn_norm(x))
        y, cache = attend(*qkv, cache)
        x = self.add(x, serve(routed, self.attn.o, expert.attn.o, y))
        x = x if between is None else between(x)
        return self.add(x, serve(routed, self.mlp, expert.mlp, self.mlp_norm(x))), cache


class Decoder(nnx.Module):
    """Causal transformer over packed rows, or over a cache."""

    def __init__(self, cfg, *, rngs, extra=None):
        """Makes it; `extra` is a function of `nnx.Rngs` returning one of the extra blocks."""
        self.cfg = cfg
        self.embed = Embed(cfg.vocab, cfg.width, rngs=rngs, scale=cfg.embed_multiplier)
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs=rngs)
        self.norm = RMSNorm(cfg.width, cfg.eps, rngs=rngs)
        head = ((cfg.width,), (cfg.vocab,), ("embed",), ("vocab",))
        self.head = None if cfg.tie else Dense(*head, rngs=rngs, bias=False)
        if bool(cfg.extra_num) != (extra is not None):
            raise ValueError(
                f"extra_num={cfg.extra_num} and {'a' if extra else 'no'} constructor of extra "
                "blocks: give both or none"
            )
        self.extra = stack(extra, cfg.extra_num, rngs=rngs) if extra else None

    def head_kernel(self):
        """Returns [D, V], the (tied) output layer."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden):
        """Returns f32[..., V]."""
        kernel = self.head_kernel().astype(hidden.dtype)
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)

    def __call__(
        self,
        x,
        positions,
        segments=None,
        *,
        cache=None,
        slots=None,
        routed=None,
        extra=None,
        attention=None,
        remat="none",
    ):
        """Returns ([B, T, D] for the head, cache).

        That is after the final norm and the division that `logits_divisor` asks of logits, so that
        whoever applies `head_kernel` gets the right ones.

        Args:
          x: [B, T, D] embeddings.
          positions: i32[B, T], rotary; tokens may share one.
          segments: i32[B, T] of packed rows, in order, 0 = padding at the end; attention stays
            inside a segment. None appends the tokens to the cache instead.
          cache: of `init_cache`, or None. With segments (prefill, one segment a row) it is filled
            from slot 0; without, the new tokens go to `slots`.
          slots: i32[B, T] of the cache, consecutive in each row; None = positions.
          routed: slots i32[B, W] and index i32[B, T] of the tokens that the expert serves, as in
            `expert.serve`; None = it serves none.
          extra: function (extra block, x) -> x; None = the extra blocks are not run.
          attention: an `AttentionSpec` for packed rows.
          remat: a key of `nn.REMAT`.
        """
        T, cfg = x.shape[1], self.cfg
        self._check(routed, extra)
        angles = angles_1d(positions, cfg.rotated, cfg.rope_theta, cfg.rope_divisors())
        if segments is None:
            layout, attend = Layout(), cached(positions if slots is None else slots, angles)
        else:
            layout = layout_of("llm", *segments.shape)
            how = dict(size=cfg.head_dim, causal=True, spec=attention, layout=layout)
            attend = packed(segments, angles, **how)
        if cfg.query_scale() is not None:
            attend = _with_scaled_queries(attend, cfg.query_scale())

        def layer(block, x, xs):
            cache, which = xs
            run = None if extra is None else functools.partial(self._run_extra, extra, which)
            inside = run if cfg.extra_place == "attention" else None
            y, new = block(x, attend, cache, routed, inside)
            if run is not None and inside is None:
                y = run(y)
            if segments is not None and cache is not None:
                new = tuple(
                    old.at[:, :T].set(n.astype(old.dtype))
                    for old, n in zip(cache, new, strict=True)
                )
            return layout.constrain(y), new

        which = None if extra is None else jnp.asarray(self._extra_of_layer())
        x, cache = scan_layers(self.blocks, layer, x, (cache, which), remat)
        x = self.norm(x)
        if cfg.logits_divisor != 1:
            x = x / jnp.asarray(cfg.logits_divisor, x.dtype)
        return x, cache

    def _check(self, routed, extra):
        if routed is not None and self.cfg.expert == "none":
            raise ValueError("routed is given and expert='none'; set expert='visual' to have one")
        if extra is not None and self.extra is None:
            raise ValueError("extra is given and extra_num=0; set it to the number of blocks")

    def _extra_of_layer(self):
        """i32[L]: the extra block of each layer, -1 = none."""
        found = np.full(self.cfg.layers, -1, np.int32)
        found[self.cfg.extra_start :: self.cfg.extra_stride][: self.cfg.extra_num] = np.arange(
            self.cfg.extra_num
        )
        return found

    def _run_extra(self, extra, which, x):
        """Returns x after extra block number `which`, x itself for -1.

        One loop with a condition: loops over groups of layers would copy the weights of all layers
        (measured on 32 layers, 10 blocks: 180 MiB instead of 4 forward, 205 instead of 62 with the
        gradient, twice the program).
        """
        graphdef, params = unbind(self.extra)

        def run(x):
            mine = jax.tree.map(
                lambda p: jax.lax.dynamic_index_in_dim(p, which, keepdims=False), params
            )
            return extra(bind(graphdef, mine), x)

        return jax.lax.cond(which >= 0, run, lambda x: x, x)


def _with_scaled_queries(attend, scale):
    def scaled(q, k, v, cache):
        return attend((q * scale).astype(q.dtype), k, v, cache)

    return scaled


def init_cache(cfg, rows, slots, dtype):
    """Returns (keys, values), each [L, B, slots, K, H] of zeros."""
    shape = (cfg.layers, rows, slots, cfg.kv_heads, cfg.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
