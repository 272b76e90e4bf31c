"""Which parameters train, how fast, and the optax chain that does it."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import optax

from vlmjax.train.moments import STORAGE, store_moments


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with a warm-up and a schedule shared by all parameters; peaks come from the `lr` table.

    Attributes:
      name: a key of `OPTIMIZERS`.
      b1, b2, eps: of Adam.
      wd: decoupled weight decay of kernels and embeddings, times the learning rate; norms and
        biases never decay.
      clip: "none", "global_norm" (all gradients together), "block_rms" (each parameter) or
        "value" (each element).
      clip_at: its threshold.
      skip_above: a step whose gradient norm, all parameters together, is above this or not a number
        changes nothing; inf: only what is not a number. 0: none is left out, and the run stops at
        what is not a number.
      schedule: a key of `SCHEDULES`, from 1 to 0 over the steps after warm-up.
      warmup: share of the steps with a linear rise from 0.
      moment_dtype: storage of the moments, a key of `moments.STORAGE`; all arithmetic is in f32.
    """

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    wd: float = 0.0
    clip: str = "none"
    clip_at: float = 1.0
    skip_above: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.03
    moment_dtype: str = "float32"


CLIPS = {
    "none": lambda at: optax.identity(),
    "global_norm": optax.clip_by_global_norm,
    "block_rms": optax.clip_by_block_rms,
    "value": optax.clip,
}
SCHEDULES = {
    "cosine": lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t)),
    "linear": lambda t: 1 - t,
    "constant": jnp.ones_like,
}
OPTIMIZERS = {
    "adamw": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "lion": lambda c: optax.scale_by_lion(c.b1, c.b2),
    "sgd": lambda c: optax.trace(c.b1) if c.b1 else optax.identity(),
}


def choose(table, key, what):
    """Returns table[key]; ValueError naming the allowed keys."""
    if key not in table:
        raise ValueError(f"{what}={key!r} is unknown; choose one of {sorted(table)}")
    return table[key]


def resolve_lr(table, paths):
    """Returns {path: peak learning rate, or None when frozen}.

    Args:
      table: ordered ((regex, peak or None), ...); the first row that matches the whole path wins.
      paths: of all parameters, "llm/blocks/attn/q/kernel".

    Raises:
      ValueError: a parameter that no row matches, or a row that matches no parameter (misspelt).
    """
    lrs, unused, unmatched = {}, [pattern for pattern, _ in table], []
    for path in paths:
        matches = [(pattern, lr) for pattern, lr in table if re.fullmatch(pattern, path)]
        unused = [pattern for pattern in unused if pattern not in dict(matches)]
        if matches:
            lrs[path] = matches[0][1]
        else:
            unmatched.append(path)
    if unused or unmatched:
        modules = sorted({p.split("/")[0] for p in paths})
        raise ValueError(
            "the lr table does not fit the model:"
            + (
                f" no row matches {unmatched[:5]}{' ...' if len(unmatched) > 5 else ''};"
                if unmatched
                else ""
            )
            + (f" no parameter matches {unused};" if unused else "")
            + f" rows are (regex of the whole path, learning rate or None to freeze), paths "
            f'start with {modules}, e.g. ("llm/.*", None)'
        )
    return lrs


def schedule(cfg, num_steps):
    """Returns a function step -> factor in [0, 1] of the peak learning rates.

    As in transformers' Trainer: warm-up is rounded up to whole steps and starts at 0, so that with
    a warm-up the first step moves only the moments, and the peak comes at step `warmup`.
    """
    shape, warmup = (
        choose(SCHEDULES, cfg.schedule, "optim.schedule"),
        math.ceil(cfg.warmup * num_steps),
    )

    def factor(step):
        t = jnp.clip((step - warmup) / max(num_steps - warmup, 1), 0, 1)
        return jnp.where(step < warmup, step / max(warmup, 1), shape(t))

    return factor


def make_optimizer(cfg, lrs, num_steps):
    """Returns the optax transformation of the trainable parameters.

    Args:
      cfg: `OptimConfig`.
      lrs: {path: peak} of the trainable parameters only.
      num_steps: length of the schedule.
    """

    def decays(params):
        return {path: path.rsplit("/", 1)[-1] in ("kernel", "embedding") for path in params}

    def scale(updates, state, params=None):
        return {path: -lrs[path] * u for path, u in updates.items()}, state

    encode = choose(STORAGE, cfg.moment_dtype, "optim.moment_dtype")
    inner = choose(OPTIMIZERS, cfg.name, "optim.name")(cfg)
    return optax.chain(
        choose(CLIPS, cfg.clip, "optim.clip")(cfg.clip_at),
        store_moments(inner, encode) if encode else inner,
        optax.add_decayed_weights(cfg.wd, decays) if cfg.wd else optax.identity(),
        optax.scale_by_schedule(schedule(cfg, num_steps)),
        optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
    )


def module_norms(tree):
    """Returns {module: l2 norm} of a {path: array} dict, by the first part of the path."""
    squares = {}
    for path, x in tree.items():
        module = path.split("/")[0]
        squares[module] = squares.get(module, 0) + jnp.sum(jnp.square(x.astype(jnp.float32)))
    return jax.tree.map(jnp.sqrt, squares)
