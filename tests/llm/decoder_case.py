"""A decoder of checkpoint tensors, run on packed rows or over a cache, in f32."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmjax import nn
from vlmjax.hf.decoders import decoder_rows
from vlmjax.hf.table import by_key
from vlmjax.hf.weights import table_tensors
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.llm.decoder import Decoder, init_cache

GOLDENS = Path(os.environ.get("VLMJAX_GOLDENS", Path(__file__).parents[1] / "goldens"))
REF = AttentionSpec("ref")


class Routed(NamedTuple):
    """What a batch says of the tokens that an expert serves."""

    slots: np.ndarray
    index: np.ndarray


def golden(name):
    """Returns (arrays, meta) of a golden file."""
    z = np.load(GOLDENS / f"{name}.npz")
    return z, json.loads(str(z["meta"]))


def check(ours, z, meta):
    """Fails unless every array of {name: array} is within the tolerance of the file."""
    errors, limits = {}, {}
    for name, value in ours.items():
        want = z[f"out/{name}"]
        errors[name] = float(np.abs(np.asarray(value) - want).max() / np.abs(want).max())
        tolerance = meta["tolerance"]
        limits[name] = tolerance.get("rel_per_array", {}).get(f"out/{name}", tolerance["rel"])
    print(errors)
    assert all(errors[name] <= limits[name] for name in errors), errors


def load(cfg, tensors, kind="llama", key="model.", head=None):
    """Returns (decoder, its rows) from {key: array}, of which every entry must be used."""
    rows = decoder_rows(cfg, kind, key, head, path="")
    assert set(by_key(rows)) == set(tensors)
    flat = {}
    for row in rows:
        leaves = [row.load(np.asarray(tensors[k])) for k in row.keys]
        flat[row.path] = np.stack(leaves) if row.stacked else leaves[0]
    abstract = jax.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    graphdef, shapes = nn.unbind(abstract)
    want = {path: leaf.shape for path, leaf in nn.flatten(shapes).items()}
    assert {path: leaf.shape for path, leaf in flat.items()} == want
    return nn.bind(graphdef, nn.unflatten(flat)), rows


def store(model, rows):
    """Returns {key: array}, the tensors of a decoder."""
    return {t.name: t.make() for t in table_tensors(rows, nn.unbind(model)[1])}


def embed(model, tokens):
    return model.embed(jnp.asarray(tokens, jnp.int32), jnp.float32)


def hidden(model, x, segments, positions=None, **more):
    """Returns [B, T, D] of packed rows; positions restart in each segment when absent."""
    segments = np.asarray(segments, np.int32)
    if positions is None:
        positions = np.zeros_like(segments)
        for row, out in zip(segments, positions, strict=True):
            for number in set(row.tolist()):
                out[row == number] = np.arange((row == number).sum())
    return model(x, jnp.asarray(positions, jnp.int32), segments, attention=REF, **more)[0]


def logits(model, x, segments, positions=None, **more):
    return model.logits(hidden(model, x, segments, positions, **more))


def loss(scores, labels):
    """Returns the mean cross-entropy of the next token where labels are not -100."""
    scores, labels = scores[:, :-1], np.asarray(labels)[:, 1:]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), np.maximum(labels, 0)[..., None], -1)
    return -chosen[..., 0][labels >= 0].mean()


def grown(model, x, positions, sizes, then=None, **more):
    """Returns f32[B, T, V] of tokens fed to a cache in pieces; the first is a prefill with `more`,
    the others have `then`.
    """
    B, T = positions.shape
    cache = init_cache(model.cfg, B, T + 3, x.dtype)
    slots = np.broadcast_to(np.arange(T), (B, T))
    found, at = [], 0
    for number, n in enumerate(sizes):
        piece = slice(at, at + n)
        if number == 0:
            one = np.ones((B, n), np.int32)
            out, cache = model(
                x[:, piece], positions[:, piece], one, cache=cache, attention=REF, **more
            )
        else:
            where = dict(cache=cache, slots=slots[:, piece])
            out, cache = model(x[:, piece], positions[:, piece], **where, **(then or {}))
        found.append(model.logits(out))
        at += n
    assert at == T
    return jnp.concatenate(found, 1)


def routed(mask, spare=1):
    """The slots and index of bool[B, T], with spare places in every row."""
    slots = np.full((len(mask), mask.sum(1).max() + spare), -1, np.int32)
    index = np.full(mask.shape, -1, np.int32)
    for row, served in enumerate(mask):
        (where,) = served.nonzero()
        slots[row, : len(where)], index[row, where] = where, np.arange(len(where))
    return Routed(slots, index)
