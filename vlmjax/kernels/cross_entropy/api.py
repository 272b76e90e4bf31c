"""Chooses the implementation of the token loss."""

from vlmjax.kernels.cross_entropy import chunked, ref


def token_nll(hidden, head, targets, mask, *, chunk=1024, columns=8192, axis=None):
    """Returns f32[B, T], the loss of supervised tokens; see `ref.token_nll`.

    Args:
      chunk: tokens whose logits exist at a time; 0 makes all logits at once (`ref`).
      columns: of the vocabulary that exist at a time.
      axis: inside `shard_map`, the mesh axis over which D of the head is spread; None = whole.
    """
    if chunk == 0 and axis is None:
        return ref.token_nll(hidden, head, targets, mask)
    return chunked.token_nll(hidden, head, targets, mask, chunk or mask.size, columns, axis)
