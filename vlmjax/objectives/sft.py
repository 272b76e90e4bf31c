"""Supervised fine-tuning: next-token cross-entropy in f32 over supervised tokens only."""

from vlmjax import sharding
from vlmjax.kernels.cross_entropy import api


def token_losses(model, batch):
    """Returns f32[B, T]: the loss of each supervised token (weight > 0), 0 elsewhere."""
    hidden = model(batch)

    def tokens(hidden, targets, mask, head):
        return api.token_nll(hidden, head, targets, mask, chunk=model.cfg.compute.loss_chunk)

    # Cast before every device gathers it whole.
    head = model.llm.head_kernel().astype(hidden.dtype)
    args = hidden, batch.targets, batch.weights > 0
    return sharding.map_tokens(tokens, *args, weight=head)


def sft(model, batch):
    """Returns (sum of weight x loss, {}): the mean that the host chose when it made the weights."""
    return (token_losses(model, batch) * batch.weights).sum(), {}
