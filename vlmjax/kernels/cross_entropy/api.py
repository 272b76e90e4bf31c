"""Chooses the implementation of the token loss."""

from vlmjax.kernels.cross_entropy import chunked, ref


def token_nll(hidden, head, targets, mask, *, chunk=1024):
    """Returns f32[B, T], the loss of supervised tokens; see `ref.token_nll`.

    Args:
      chunk: tokens whose logits exist at a time; 0 makes all logits at once (`ref`).
    """
    if chunk == 0:
        return ref.token_nll(hidden, head, targets, mask)
    return chunked.token_nll(hidden, head, targets, mask, chunk)
