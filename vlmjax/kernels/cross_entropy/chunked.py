"""Linear layer + cross-entropy over supervised tokens in chunks; other tokens never get logits.

The supervised tokens are brought to the front by one stable sort; a loop whose trip count is their
number takes a chunk at a time through the head. The backward pass makes the chunk's logits again,
so memory is one chunk of logits.
"""

import functools

import jax
import jax.numpy as jnp


def _setup(hidden, targets, mask, chunk):
    """Returns (flat hidden, flat targets, order in whole chunks, number supervised, chunks)."""
    N = mask.size
    flat = mask.reshape(N)
    count = flat.sum(dtype=jnp.int32)
    order = jnp.argsort(~flat, stable=True).astype(jnp.int32)
    order = jnp.pad(
        order, (0, -N % chunk), constant_values=N
    )  # N is out of range: dropped when written
    return hidden.reshape(N, -1), targets.reshape(N), order, count, -(-count // chunk)


def _chunk_logits(c, order, count, hidden, head, targets, chunk):
    """Returns (indices, out of range if unsupervised; hidden rows; f32 logits; targets)."""
    index = jax.lax.dynamic_slice_in_dim(order, c * chunk, chunk)
    index = jnp.where(c * chunk + jnp.arange(chunk) < count, index, hidden.shape[0])
    rows = jnp.take(hidden, index, axis=0, mode="clip")
    logits = jnp.einsum(
        "cd,dv->cv", rows, head.astype(rows.dtype), preferred_element_type=jnp.float32
    )
    return index, rows, logits, jnp.take(targets, index, mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_nll(hidden, head, targets, mask, chunk):
    """Returns f32[B, T], the same function as `ref.token_nll`.

    Args:
      hidden, head, targets, mask: as in `ref.token_nll`.
      chunk: tokens whose logits exist at a time (static).
    """
    nll, _ = _forward(hidden, head, targets, mask, chunk)
    return nll


def _forward(hidden, head, targets, mask, chunk):
    flat, flat_targets, order, count, num = _setup(hidden, targets, mask, chunk)

    def body(c, carry):
        nll, lse = carry
        index, _, logits, t = _chunk_logits(c, order, count, flat, head, flat_targets, chunk)
        z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0]
        return nll.at[index].set(z - picked, mode="drop"), lse.at[index].set(z, mode="drop")

    zeros = jnp.zeros(mask.size, jnp.float32)
    nll, lse = jax.lax.fori_loop(0, num, body, (zeros, zeros))
    return nll.reshape(mask.shape), lse


def _forward_rule(hidden, head, targets, mask, chunk):
    values = tuple(x.value for x in (hidden, head, targets, mask))
    nll, lse = _forward(*values, chunk)
    # A frozen head gets no gradient: its marker is None, which is static in the residuals.
    return nll, (*values, lse, jnp.zeros(()) if head.perturbed else None)


def _backward_rule(chunk, residuals, g):
    hidden, head, targets, mask, lse, train_head = residuals
    flat, flat_targets, order, count, num = _setup(hidden, targets, mask, chunk)
    g = jnp.zeros(mask.size, jnp.float32) if type(g).__name__ == "SymbolicZero" else g.reshape(-1)

    def body(c, carry):
        d_hidden, d_head = carry
        index, rows, logits, t = _chunk_logits(c, order, count, flat, head, flat_targets, chunk)
        z = jnp.take(lse, index, mode="clip")[:, None]
        d = jnp.exp(logits - z) - jax.nn.one_hot(t, logits.shape[-1], dtype=jnp.float32)
        d = d * jnp.take(g, index, mode="fill", fill_value=0)[:, None]
        d_rows = jnp.einsum("cv,dv->cd", d.astype(rows.dtype), head.astype(rows.dtype))
        d_hidden = d_hidden.at[index].set(d_rows, mode="drop")
        if d_head is not None:
            d_head += jnp.einsum(
                "cd,cv->dv", rows, d.astype(rows.dtype), preferred_element_type=jnp.float32
            )
        return d_hidden, d_head

    d_head = None if train_head is None else jnp.zeros(head.shape, jnp.float32)
    d_hidden, d_head = jax.lax.fori_loop(0, num, body, (jnp.zeros_like(flat), d_head))
    return (
        d_hidden.reshape(hidden.shape),
        None if d_head is None else d_head.astype(head.dtype),
        None,
        None,
    )


token_nll.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
