"""Supervised fine-tuning: next-token cross-entropy in f32 over supervised tokens only."""

from vlmjax import sharding
from vlmjax.kernels.cross_entropy import api


def token_losses(model, batch):
    """Returns f32[B, T]: the loss of each supervised token (weight > 0), 0 elsewhere."""
    hidden = model(batch)

    def rows(hidden, targets, mask, head):
        return api.token_nll(hidden, head, targets, mask, chunk=model.cfg.compute.loss_chunk)

    args = hidden, batch.targets, batch.weights > 0
    return sharding.map_rows(rows, *args, replicated=(model.llm.head_kernel(),))


def sft(model, batch):
    """Returns (sum of weight x loss, {}): the mean that the host chose when it made the weights."""
    return (token_losses(model, batch) * batch.weights).sum(), {}
