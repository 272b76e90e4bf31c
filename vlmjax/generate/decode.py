"""Batched generation with fixed shapes: one compiled prefill, one compiled loop.

    generator = Generator(config, params)
    completions = generator.generate_samples(samples, max_new_tokens=64, stop_ids=[end])

Each prompt is a row. Token and patch slots are rounded up to powers of two, so that few programs
are compiled, whatever the prompts; `Generator.programs` lists them. The loop over new tokens runs
on the device until every row has stopped.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmjax import build
from vlmjax.batch import Budget
from vlmjax.data.pack import check_fits, pack, size
from vlmjax.data.sample import Sample
from vlmjax.generate.sampling import GREEDY, choose
from vlmjax.llm.decoder import init_cache
from vlmjax.nn import bind, flatten

LEAST_TOKENS, LEAST_PATCHES, LEAST_NEW = 32, 64, 16
NO_TOKEN = -1


def bucket(n, least):
    """Returns the smallest power of two that is at least `n` and `least`; 0 for 0."""
    return 1 << (max(n, least) - 1).bit_length() if n else 0


class Completion(NamedTuple):
    """Generated tokens i32[n] without the stop token, and why they end: "stop" or "length"."""

    tokens: np.ndarray
    finish: str


class Decoded(NamedTuple):
    """What `decode` returns: i32[B, new] padded with -1, i32[B] counts, bool[B], cache."""

    tokens: jax.Array
    counts: jax.Array
    stopped: jax.Array
    cache: tuple


class _Loop(NamedTuple):
    step: jax.Array  # tokens chosen so far in each row
    token: jax.Array  # i32[B], the last one
    out: jax.Array  # i32[B, new]
    counts: jax.Array  # i32[B]
    stopped: jax.Array  # bool[B]
    seen: jax.Array | None  # bool[B, V]


@functools.partial(jax.jit, static_argnames=("graphdef", "slots"))
def prefill(graphdef, params, batch, lengths, slots):
    """Returns (f32[B, V] scores of each row's next token, cache with `slots` slots).

    Args:
      graphdef, params: of `nn.unbind`.
      batch: a `Batch` of one sample a row.
      lengths: i32[B] of the samples, 0 for an empty row.
      slots: of the cache, static, at least T.
    """
    model = bind(graphdef, params)
    cache = init_cache(model.cfg.llm, len(lengths), slots, jnp.dtype(model.cfg.compute.dtype))
    hidden, cache = model.prefill(batch, cache)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return model.llm.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0]), cache


@functools.partial(
    jax.jit, static_argnames=("graphdef", "new", "sampling"), donate_argnames=("cache",)
)
def decode(
    graphdef,
    params,
    cache,
    logits,
    lengths,
    ids,
    seed,
    stop_ids,
    limit,
    new,
    sampling,
    positions=None,
):
    """Returns `Decoded`: at most `limit` tokens a row.

    The last token of a row is not in the cache yet when the row has not stopped.

    Args:
      graphdef, params: of `nn.unbind`.
      cache: of `prefill`, with room for `limit` more tokens; donated.
      logits: f32[B, V] scores of the first token.
      lengths: i32[B] tokens in the cache, 0 for an empty row.
      ids: i32[B]; row r draws from the stream of random numbers (seed, ids[r]).
      seed: i32[].
      stop_ids: i32[n].
      limit: i32[], at most `new`.
      new: static size of the result.
      sampling: a `SamplingConfig`, static.
      positions: i32[B], the rotary position of the first new token where it differs from the
        number of tokens before it, because these share positions; None = lengths.
    """
    model = bind(graphdef, params)
    B = len(lengths)
    positions = lengths if positions is None else positions
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), ids)
    idle = lengths == 0

    def add(loop, logits):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, loop.step)
        token = choose(logits, loop.seen, step_keys, sampling)
        stop = jnp.isin(token, stop_ids)
        real = ~(idle | loop.stopped | stop)
        seen = loop.seen if loop.seen is None else loop.seen.at[jnp.arange(B), token].set(True)
        return _Loop(
            step=loop.step + 1,
            token=token,
            out=loop.out.at[:, loop.step].set(jnp.where(real, token, NO_TOKEN)),
            counts=loop.counts + real,
            stopped=loop.stopped | stop,
            seen=seen,
        )

    def advance(carry):
        loop, cache = carry
        x = model.llm.embed(loop.token[:, None], jnp.dtype(model.cfg.compute.dtype))
        at, slots = ((first + loop.step - 1)[:, None] for first in (positions, lengths))
        hidden, cache = model.llm(x, at, cache=cache, slots=slots)
        return add(loop, model.llm.logits(hidden[:, 0])), cache

    def unfinished(carry):
        loop, _ = carry
        return (loop.step < limit) & ~jnp.all(loop.stopped | idle)

    start = _Loop(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros(B, jnp.int32),
        out=jnp.full((B, new), NO_TOKEN, jnp.int32),
        counts=jnp.zeros(B, jnp.int32),
        stopped=jnp.zeros(B, bool),
        seen=jnp.zeros(logits.shape, bool) if sampling.repetition_penalty != 1 else None,
    )
    loop, cache = jax.lax.while_loop(unfinished, advance, (add(start, logits), cache))
    return Decoded(loop.out, loop.counts, loop.stopped, cache)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def score(graphdef, params, batch):
    """Returns f32[B, T, V], the scores at every position."""
    return bind(graphdef, params).logits(batch)


def _next_positions(batch, lengths):
    """Returns i32[B]: the rotary position after the last token of each row, 0 for an empty one."""
    rows = np.arange(len(lengths))
    return np.where(lengths > 0, batch.positions[rows, lengths - 1] + 1, 0).astype(np.int32)


class Generator:
    """Generates from samples with one model. Compiled programs are shared by equal configs.

    Attributes:
      programs: the shapes used so far, (name, sizes...); each was compiled once.
    """

    def __init__(self, config, params, rows=64, max_length=None):
        """Makes it.

        Args:
          config: a `VLMConfig`.
          params: nested dict of arrays.
          rows: most prompts that run together.
          max_length: most tokens of a prompt and its answer together; None = no limit.
        """
        if rows < 1:
            raise ValueError(f"rows={rows} is not allowed: it must be at least 1; raise it")
        self.config = dataclasses.replace(
            config, compute=dataclasses.replace(config.compute, remat="none")
        )
        self.graphdef, shapes, _ = build.abstract(self.config)
        build.check_params(flatten(params), shapes, "the generator")
        self.params = jax.device_put(params)
        self.rows, self.max_length = rows, max_length
        self.programs = set()

    def budget(self, samples):
        """Returns the `Budget` of rows that each take one of the samples.

        Units that become one visual token each have as many slots as tokens, which saves programs
        and costs little.
        """
        form = self.config.form
        least = Budget(1, (0,) * len(form.towers), *((n,) * len(form.encoders) for n in (0, 4)))
        sizes = np.max([size(s, least) for s in samples], 0)
        tokens, encoders = bucket(int(sizes[0]), LEAST_TOKENS), len(form.towers)
        patches = [bucket(int(n), LEAST_PATCHES) for n in sizes[1 : 1 + encoders]]
        for e, tower in enumerate(form.towers):
            if tower.out is not None and patches[e]:  # which takes whole views of one size
                view = next(i.num_slots for s in samples for i in s.items if i.encoder == e)
                patches[e] = view * bucket(int(sizes[1 + e]) // view, 1)
        if not any(patches):
            return dataclasses.replace(least, tokens=tokens)
        single = {k for sources, number in form.groups if number == 1 for k in sources}
        units = [s.placed().units for s in samples if s.items]
        pools = [a.pool for a in map(Sample.placed, samples) if a.pool is not None]
        visual = [
            max(tokens * (k in single), bucket(int(n), 1))
            for k, n in enumerate(sizes[1 + encoders : -2])
        ]
        group = [bucket(max(u[k].index.shape[1] for u in units), 4) for k in range(len(visual))]
        routed = bucket(int(sizes[-1]), LEAST_TOKENS)
        if form.routed == "queries":  # the decoder sees them unit by unit
            routed = sum(visual[sources[0]] * number for sources, number in form.groups)
        pool = (tokens, max(p.index.shape[1] for p in pools)) if pools else (0, 0)
        return Budget(tokens, patches, visual, group, pool, routed)

    def batch(self, samples, rows):
        """Returns (`Batch`, `Budget`, i32[rows] lengths): one sample a row, then empty rows."""
        budget = self.budget(samples)
        for sample in samples:
            check_fits(sample, budget)
        by_row = [[s] for s in samples] + [[]] * (rows - len(samples))
        lengths = np.array([len(s.tokens) for s in samples] + [0] * (rows - len(samples)), np.int32)
        return pack(by_row, budget, self.config.form)[0], budget, lengths

    def logits(self, sample):
        """Returns f32[n, V], the scores of what follows each of the n tokens of a sample."""
        self._check_length(sample, 0)
        batch, budget, (n,) = self.batch([sample], 1)
        self.programs.add(("score", budget))
        return np.asarray(score(self.graphdef, self.params, batch)[0, :n])

    def generate_samples(self, samples, max_new_tokens=64, sampling=GREEDY, stop_ids=(), seed=0):
        """Returns the `Completion` of each sample.

        A result depends on its sample, the seed and its place in the list, never on how samples are
        grouped.

        Args:
          samples: list of `Sample`, each ending where the answer begins.
          max_new_tokens: most tokens of an answer.
          sampling: a `SamplingConfig`.
          stop_ids: tokens that end an answer.
          seed: of what is drawn.
        """
        if max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} is not allowed: it must be at least 1; raise it"
            )
        for sample in samples:
            self._check_length(sample, max_new_tokens)
        order = sorted(range(len(samples)), key=lambda i: self.budget([samples[i]]))
        rows = min(self.rows, bucket(len(samples), 1))
        found = {}
        for at in range(0, len(order), rows or 1):
            chosen = order[at : at + rows]
            args = [samples[i] for i in chosen], chosen, rows, max_new_tokens
            found |= zip(chosen, self._generate(*args, sampling, stop_ids, seed), strict=True)
        return [found[i] for i in range(len(samples))]

    def _generate(self, samples, ids, rows, max_new_tokens, sampling, stop_ids, seed):
        batch, budget, lengths = self.batch(samples, rows)
        new = bucket(max_new_tokens, LEAST_NEW)
        slots = budget.tokens + new
        stop_ids = np.array(sorted(set(stop_ids)), np.int32)
        self.programs |= {
            ("prefill", rows, budget, slots),
            ("decode", rows, slots, new, sampling, len(stop_ids)),
        }
        logits, cache = prefill(self.graphdef, self.params, batch, lengths, slots)
        ids = np.array([*ids, *[0] * (rows - len(ids))], np.int32)
        tokens, counts, stopped = map(
            np.asarray,
            decode(
                self.graphdef,
                self.params,
                cache,
                logits,
                lengths,
                ids,
                np.int32(seed),
                stop_ids,
                np.int32(max_new_tokens),
                new=new,
                sampling=sampling,
                positions=_next_positions(batch, lengths),
            )[:3],
        )
        return [
            Completion(tokens[r, : counts[r]], "stop" if stopped[r] else "length")
            for r in range(len(samples))
        ]

    def _check_length(self, sample, new):
        n, limit = len(sample.tokens), self.max_length
        if not n:
            raise ValueError(f"sample {sample.id!r} has no tokens; give at least one")
        if limit is not None and n + new > limit:
            raise ValueError(
                f"prompt {sample.id!r} has {n} tokens ({int(sample.visual.sum())} visual) and "
                f"max_new_tokens is {new}: together {n + new}, at most {limit} are allowed; "
                "shorten it, show fewer or smaller images and frames, or lower max_new_tokens"
            )
