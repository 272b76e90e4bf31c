"""The training step, a pure function of (state, batch), and the state it carries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlmjax.nn import bind, unflatten
from vlmjax.objectives.sft import token_losses
from vlmjax.train.optimizer import module_norms


class TrainState(NamedTuple):
    """Everything that changes. Parameters are flat {path: array} dicts, split before gradients."""

    step: jax.Array  # i32[], steps done
    trainable: dict  # f32 masters
    frozen: dict  # never differentiated, no optimizer state
    opt: optax.OptState


def init_state(params, lrs, optimizer, frozen_dtype):
    """Returns the `TrainState` of step 0.

    Args:
      params: {path: array}.
      lrs: {path: peak or None}, of `resolve_lr`.
      optimizer: of `make_optimizer`.
      frozen_dtype: storage of frozen parameters.
    """
    trainable = {p: x.astype(jnp.float32) for p, x in params.items() if lrs[p] is not None}
    frozen = {p: x.astype(frozen_dtype) for p, x in params.items() if lrs[p] is None}
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))


def measure_loss(graphdef, state, batch):
    """Returns (f32[] sum of the losses of supervised tokens in nats, i32[] number of these tokens).

    Args:
      graphdef: of `nn.unbind`.
      state: a `TrainState`.
      batch: a `Batch`; of its weights only whether they are above 0 counts.
    """
    model = bind(graphdef, unflatten(state.trainable | state.frozen))
    return token_losses(model, batch).sum(), (batch.weights > 0).sum()


def _counts(x):
    """Whether a leaf of the optimizer's state is a number of steps."""
    return x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)


def make_train_step(graphdef, objective, optimizer, accumulate=1, skip_above=0.0):
    """Returns train_step(state, batch) -> (state, metrics).

    Args:
      graphdef: of `nn.unbind`.
      objective: function (model, batch) -> (loss, metrics).
      optimizer: of `make_optimizer`.
      accumulate: micro-batches that the rows of a batch are cut into; their gradients are added up,
        which gives the gradient of the whole batch because the loss is a sum with weights
        made for the whole batch.
      skip_above: of `OptimConfig`.

    The weights of a batch are made to sum to 1 here: hosts pack rows without those of the others.
    """

    def loss_of(trainable, frozen, batch):
        return objective(bind(graphdef, unflatten(trainable | frozen)), batch)

    def gradient(state, batch):
        if accumulate == 1:
            return jax.value_and_grad(loss_of, has_aux=True)(state.trainable, state.frozen, batch)
        # Row r goes to micro-batch r % accumulate, so that no row leaves its device.
        micro = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def one(batch):
            return jax.value_and_grad(loss_of, has_aux=True)(state.trainable, state.frozen, batch)

        def add(total, batch):
            return jax.tree.map(jnp.add, total, one(batch)), None

        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, micro)[0]

    def train_step(state, batch):
        batch = batch._replace(weights=batch.weights / jnp.maximum(batch.weights.sum(), 1e-30))
        (loss, metrics), grads = gradient(state, batch)
        updates, opt = optimizer.update(grads, state.opt, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        norms = module_norms(grads)
        values = {"loss": loss, **metrics} | {f"grad_norm/{m}": n for m, n in norms.items()}
        if skip_above:
            norm = jnp.sqrt(sum(jnp.square(n) for n in norms.values()))
            good = jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= skip_above)
            values["skipped"] = 1 - good
            before, after = (state.trainable, state.opt), (trainable, opt)
            trainable, opt = jax.tree.map(
                lambda a, b: b if _counts(b) else jnp.where(good, b, a), before, after
            )
        return TrainState(state.step + 1, trainable, state.frozen, opt), values

    return train_step
