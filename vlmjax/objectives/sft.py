"""Supervised fine-tuning: next-token cross-entropy in f32 over supervised tokens only."""

from vlmjax import sharding
from vlmjax.kernels.cross_entropy import api


def token_losses(model, batch):
    """Returns f32[B, T]: the loss of each supervised token (weight > 0), 0 elsewhere."""
    hidden, compute = model(batch), model.cfg.compute

    def tokens(hidden, targets, mask, head, axis):
        chunks = dict(chunk=compute.loss_chunk, columns=compute.loss_columns)
        return api.token_nll(hidden, head, targets, mask, **chunks, axis=axis)

    args = hidden, batch.targets, batch.weights > 0
    return sharding.map_tokens(tokens, *args, weight=model.llm.head_kernel())


def sft(model, batch):
    """Returns (sum of weight x loss, {}): the mean that the host chose when it made the weights."""
    return (token_losses(model, batch) * batch.weights).sum(), {}
