"""Chooses next tokens from their scores: greedy, or by chance.

Penalty, temperature, top-k and top-p are those of transformers' logits processors, but that the
repetition penalty leaves the prompt alone.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen; the default is greedy.

    Attributes:
      temperature: scores are divided by it; 0 = always the best token.
      top_k: only the k best tokens can be drawn; 0 = all.
      top_p: only the best tokens that together have this probability can be drawn; 1 = all.
      repetition_penalty: scores of tokens generated before (never those of the prompt) are divided
        by it where positive and multiplied where negative; 1 = none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        checks = (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k == int(self.top_k) and self.top_k >= 0, "a whole number, 0 = all"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "repetition_penalty",
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "above 0, 1 = none",
            ),
        )
        for name, good, allowed in checks:
            if not good:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not allowed: it must be {allowed}; change it"
                )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError(
                f"top_k={self.top_k} and top_p={self.top_p} limit what can be drawn, but "
                "temperature=0 draws nothing, it takes the best token; set temperature above 0"
            )


GREEDY = SamplingConfig()


def warp(logits, seen, config):
    """Returns f32[B, V] after repetition penalty, temperature, top-k and top-p, in that order.

    Args:
      logits: f32[B, V].
      seen: bool[B, V], True for tokens generated before; only read with a repetition penalty.
      config: a `SamplingConfig`.
    """
    if config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if config.temperature not in (0, 1):
        logits = logits / config.temperature
    if config.top_k:
        least = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p < 1:
        order = jnp.argsort(logits, axis=-1)  # worst first
        ordered = jnp.take_along_axis(logits, order, axis=-1)
        drop = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) <= 1 - config.top_p
        drop = drop.at[:, -1].set(False)
        rows = jnp.arange(len(logits))[:, None]
        logits = jnp.where(jnp.zeros_like(drop).at[rows, order].set(drop), -jnp.inf, logits)
    return logits


def choose(logits, seen, keys, config):
    """Returns i32[B] next tokens.

    Args:
      logits: f32[B, V].
      seen: bool[B, V] tokens generated before, or None without a repetition penalty.
      keys: random keys [B], one a row, so that a row's tokens do not depend on its neighbours.
      config: a `SamplingConfig`, static.
    """
    scores = warp(logits, seen, config)
    if config.temperature == 0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
