"""The chunked token loss against the definition, and what it never makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax.kernels.cross_entropy import api


def inputs(share, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(2, 30, 16)).astype(np.float32)
    head = rng.normal(size=(16, 53)).astype(np.float32)
    targets = rng.integers(0, 53, (2, 30)).astype(np.int32)
    return (
        hidden,
        head,
        targets,
        rng.random((2, 30)) < share,
        rng.random((2, 30)).astype(np.float32),
    )


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("columns", [20, 53, 8192])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_chunked_equals_ref(share, chunk, columns):
    hidden, head, targets, mask, weights = inputs(share)

    def run(chunk):
        def loss(hidden, head):
            return (
                api.token_nll(hidden, head, targets, mask, chunk=chunk, columns=columns) * weights
            ).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)

    (want, want_grads), (got, got_grads) = run(0), run(chunk)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_logits_exist_for_a_chunk_only():
    """No array of the compiled program has more than `chunk` rows of vocabulary width."""
    hidden, head, targets, mask, weights = inputs(0.3)

    def loss(hidden, head):
        return (api.token_nll(hidden, head, targets, mask, chunk=5) * weights).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head).compile().as_text()
    assert "f32[5,53]" in text
    assert "[60,53]" not in text and "[2,30,53]" not in text


def test_frozen_head_gets_no_gradient_work():
    hidden, head, targets, mask, _ = inputs(0.3)

    def loss(hidden, head):
        return api.token_nll(hidden, head, targets, mask, chunk=5).sum()

    def products(argnums):
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums))(jnp.asarray(hidden), jnp.asarray(head))
        return str(jaxpr).count("dot_general")

    assert products(0) == products((0, 1)) - 1
