"""Decoders that transformers has no class for, and GLM-4V's, against outputs of their own code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from decoder_case import (
    check,
    embed,
    golden,
    grown,
    load,
    logits,
    loss,
    routed,
    store,
)

from vlmjax.hf.llm_config import read_llm


def _weights(z, prefix):
    return {k.removeprefix(prefix): z[k] for k in z.files if k.startswith(prefix)}


def _model(z, meta, model_type, kind, prefix="w/"):
    tensors = {k: v for k, v in _weights(z, prefix).items() if "vision." not in k}
    cfg = read_llm({"model_type": model_type, **meta["config"]}, "the golden file")
    model, rows = load(cfg, tensors, kind)
    stored = store(model, rows)
    assert all(np.array_equal(stored[key], value) for key, value in tensors.items())
    return model


def _placed(text, features, tokens, marker):
    """Rows of embeddings in which the three slots from `marker` on became all features."""
    rows = []
    for row, ids, vectors in zip(text, tokens, features, strict=True):
        at = int((ids == marker).nonzero()[0][0])
        rows.append(jnp.concatenate([row[:at], vectors, row[at + 3 :]]))
    return jnp.stack(rows)


def test_golden_internlm2():
    z, meta = golden("internlm2")
    model = _model(z, meta | {"config": meta["config"]}, "internlm2", "internlm2")
    mask = z["in/attention_mask"]
    run = jax.jit(lambda m: logits(m, embed(m, z["in/input_ids"]), mask))
    scores = jnp.where(mask[..., None], run(model), 0)
    check({"logits": scores, "loss": loss(scores, z["in/labels"])}, z, meta)


def test_golden_minicpm():
    z, meta = golden("minicpm_llm")
    config = meta["config"] | {"tie_word_embeddings": False}
    model = _model(z, meta | {"config": config}, "minicpm", "llama", "w/llm.")
    x, mask = embed(model, z["in/input_ids"]), z["in/attention_mask"]
    with_image = x
    for row, (start, end) in enumerate(z["in/image_bounds"]):
        with_image = with_image.at[row, start:end].set(z["in/image_embeds"][row])
    scores, seen = (jnp.where(mask[..., None], logits(model, e, mask), 0) for e in (x, with_image))
    ours = {"logits": scores, "loss": loss(scores, z["in/labels"])}
    check(ours | {"inputs_embeds": with_image, "logits_with_image": seen}, z, meta)


def test_golden_glm4v():
    z, meta = golden("glm4v")
    config = meta["config"] | {"intermediate_size": meta["config"]["ffn_hidden_size"]}
    model = _model(z, meta | {"config": config}, "glm", "glm", "w/llm.")
    assert (model.cfg.rotary, model.cfg.eps) == (4, 1.5625e-7)
    tokens, positions = z["in/input_ids"], z["out/position_ids"]
    boi = meta["config"]["boi_token_id"]
    x = _placed(embed(model, tokens), z["out/image_features"], tokens, boi)
    scores = jax.jit(lambda m: logits(m, x, np.ones(positions.shape), positions))(model)
    check({"logits": scores}, z, meta)
    # The patches share a position; the cache has slots of its own.
    start = int((tokens[0] == boi).nonzero()[0][0]) + len(z["out/image_features"][0])
    cached = jax.jit(lambda m: grown(m, x, positions, (start, 1, positions.shape[1] - start - 1)))
    check({"logits": cached(model)}, z, meta)


def _cogvlm2():
    z, meta = golden("cogvlm2")
    config = meta["config"] | {"rope_theta": None}
    config.pop("rope_theta")  # a constant of the original code
    model = _model(z, meta | {"config": config}, "cogvlm", "cogvlm")
    x = embed(model, z["in/input_ids"])
    for row, features in enumerate(z["out/image_features"]):
        x = x.at[row, z["in/token_type_ids"][row] == 1].set(features)
    return z, meta, model, x


def test_golden_cogvlm2():
    z, meta, model, x = _cogvlm2()
    mask, positions = z["in/attention_mask"], z["out/position_ids"]
    served = routed(z["out/vision_expert_mask"])
    scores = jax.jit(lambda m: logits(m, x, mask, positions, routed=served))(model)
    scores = jnp.where(mask[..., None], scores, 0)
    check({"logits": scores, "loss": loss(scores, z["in/labels"])}, z, meta)


def test_golden_cogvlm2_over_a_cache():
    z, meta, model, x = _cogvlm2()
    for row in (0, 1):  # the rows with an image have text alone after it
        T = int(z["in/attention_mask"][row].sum())
        n = int(z["in/token_type_ids"][row].nonzero()[0][-1]) + 1
        served = routed(z["out/vision_expert_mask"][row : row + 1, :n])
        positions = z["out/position_ids"][row : row + 1, :T]
        assert positions.max() < T - 1  # shared
        sizes = (n, 1, T - n - 1)
        grow = functools.partial(grown, positions=positions, sizes=sizes, routed=served)
        scores = jax.jit(grow)(model, x[row : row + 1, :T])
        want = {"out/logits": z["out/logits"][row : row + 1, :T]}
        check({"logits": scores}, want, meta)
