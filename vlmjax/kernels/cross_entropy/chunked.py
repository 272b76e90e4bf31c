"""Linear layer + cross-entropy over supervised tokens, in chunks of vocabulary and of tokens.

The supervised tokens are brought to the front by one stable sort. An outer loop takes a chunk of
the vocabulary: where the head is spread over devices only this part of it is gathered, and its
gradient goes back before the next one begins, so neither exists whole. An inner loop whose trip
count is the number of supervised tokens takes a chunk of these through it, with the softmax online
as in FlashAttention. The backward pass makes logits again: memory is one chunk of them.
"""

import functools

import jax
import jax.numpy as jnp

NEG = -1e30


def _supervised(hidden, targets, mask, chunk):
    """Returns (hidden [n, D], targets i32[n], index of each token i32[n], count, chunks).

    Supervised tokens come first; n is N in whole chunks. The index of the others is N, out of
    range: dropped when written.
    """
    N, flat = mask.size, mask.reshape(-1)
    count = flat.sum(dtype=jnp.int32)
    order = jnp.argsort(~flat, stable=True).astype(jnp.int32)
    index = jnp.where(jnp.arange(N) < count, order, N)
    index = jnp.pad(index, (0, -N % chunk), constant_values=N)
    rows = jnp.take(hidden.reshape(N, -1), index, axis=0, mode="clip")
    return rows, jnp.take(targets.reshape(-1), index, mode="clip"), index, -(-count // chunk)


def _columns(head, number, size, dtype, axis):
    """Returns (first column, chunk [D, size] of the head in dtype, gathered; columns it repeats).

    The last chunk ends with the head and repeats columns of the one before.
    """
    start = jnp.minimum(number * size, head.shape[1] - size)
    part = jax.lax.dynamic_slice_in_dim(head, start, size, axis=1).astype(dtype)
    if axis is not None:
        part = jax.lax.all_gather(part, axis, tiled=True)
    return start, part, number * size - start


def _logits(rows, part, repeated):
    """Returns f32[chunk, size]; repeated columns count nothing."""
    logits = jnp.einsum("cd,dv->cv", rows, part, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(part.shape[1]) >= repeated, logits, NEG)


def _at(x, c, chunk):
    return jax.lax.dynamic_slice_in_dim(x, c * chunk, chunk)


def _put(x, c, value):
    return jax.lax.dynamic_update_slice_in_dim(x, value, c * len(value), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def token_nll(hidden, head, targets, mask, chunk, columns, axis):
    """Returns f32[B, T], the same function as `ref.token_nll`.

    Args:
      hidden, head, targets, mask: as in `ref.token_nll`.
      chunk: tokens whose logits exist at a time (static).
      columns: of the vocabulary that exist at a time (static).
      axis: mesh axis over which D of the head is spread, or None for a whole head.
    """
    return _forward(hidden, head, targets, mask, chunk, columns, axis)[0]


def _forward(hidden, head, targets, mask, chunk, columns, axis):
    rows, goals, index, num = _supervised(hidden, targets, mask, chunk)
    size = min(columns, head.shape[1])

    def vocabulary(carry, number):
        start, part, repeated = _columns(head, number, size, rows.dtype, axis)

        def tokens(c, carry):
            top, total, picked = carry
            logits = _logits(_at(rows, c, chunk), part, repeated)
            old, goal = _at(top, c, chunk), _at(goals, c, chunk)
            new = jnp.maximum(old, logits.max(-1))
            sums = _at(total, c, chunk) * jnp.exp(old - new)
            sums += jnp.exp(logits - new[:, None]).sum(-1)
            here = jnp.arange(size) == (goal - start)[:, None]
            here &= (goal >= start + repeated)[:, None]
            goal_logit = _at(picked, c, chunk) + jnp.where(here, logits, 0).sum(-1)
            return _put(top, c, new), _put(total, c, sums), _put(picked, c, goal_logit)

        return jax.lax.fori_loop(0, num, tokens, carry), None

    zeros = jnp.zeros(len(rows), jnp.float32)
    carry = zeros + NEG, zeros, zeros
    numbers = jnp.arange(-(-head.shape[1] // size))
    top, total, picked = jax.lax.scan(vocabulary, carry, numbers)[0]
    lse = top + jnp.log(jnp.maximum(total, 1e-30))
    nll = jnp.zeros(mask.size, jnp.float32).at[index].set(lse - picked, mode="drop")
    return nll.reshape(mask.shape), lse


def _forward_rule(hidden, head, targets, mask, chunk, columns, axis):
    values = tuple(x.value for x in (hidden, head, targets, mask))
    nll, lse = _forward(*values, chunk, columns, axis)
    # A frozen head gets no gradient: its marker is None, which is static in the residuals.
    return nll, (*values, lse, jnp.zeros(()) if head.perturbed else None)


def _backward_rule(chunk, columns, axis, residuals, g):
    hidden, head, targets, mask, lse, train_head = residuals
    rows, goals, index, num = _supervised(hidden, targets, mask, chunk)
    size = min(columns, head.shape[1])
    g = jnp.zeros(mask.size, jnp.float32) if type(g).__name__ == "SymbolicZero" else g.reshape(-1)
    g = jnp.take(g, index, mode="fill", fill_value=0)

    def vocabulary(carry, number):
        d_rows, d_head = carry
        start, part, repeated = _columns(head, number, size, rows.dtype, axis)

        def tokens(c, carry):
            d_rows, d_part = carry
            mine = _at(rows, c, chunk)
            d = jnp.exp(_logits(mine, part, repeated) - _at(lse, c, chunk)[:, None])
            here = jnp.arange(size) == (_at(goals, c, chunk) - start)[:, None]
            here &= (jnp.arange(size) >= repeated)[None]
            d = ((d - here) * _at(g, c, chunk)[:, None]).astype(rows.dtype)
            f32 = dict(preferred_element_type=jnp.float32)
            d_rows = _put(
                d_rows, c, _at(d_rows, c, chunk) + jnp.einsum("cv,dv->cd", d, part, **f32)
            )
            if d_part is not None:
                d_part += jnp.einsum("cd,cv->dv", mine, d, **f32)
            return d_rows, d_part

        d_part = None if d_head is None else jnp.zeros(part.shape, jnp.float32)
        d_rows, d_part = jax.lax.fori_loop(0, num, tokens, (d_rows, d_part))
        if d_head is not None:
            if axis is not None:  # summed over chips as every other weight's gradient
                d_part = jax.lax.psum_scatter(d_part.astype(rows.dtype), axis, tiled=True)
                d_part = d_part.astype(jnp.float32)
            old = jax.lax.dynamic_slice_in_dim(d_head, start, size, axis=1)
            d_part = jnp.where(jnp.arange(size) >= repeated, d_part, old)
            d_head = jax.lax.dynamic_update_slice_in_dim(d_head, d_part, start, axis=1)
        return (d_rows, d_head), None

    d_head = None if train_head is None else jnp.zeros(head.shape, jnp.float32)
    carry = jnp.zeros(rows.shape, jnp.float32), d_head
    numbers = jnp.arange(-(-head.shape[1] // size))
    (d_rows, d_head), _ = jax.lax.scan(vocabulary, carry, numbers)
    d_hidden = jnp.zeros((mask.size, rows.shape[1]), hidden.dtype)
    d_hidden = d_hidden.at[index].set(d_rows.astype(hidden.dtype), mode="drop")
    d_head = None if d_head is None else d_head.astype(head.dtype)
    return d_hidden.reshape(hidden.shape), d_head, None, None


token_nll.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
