"""The optimizer against torch.optim.AdamW and transformers' schedules; what its tables refuse."""

import math

import jax
import numpy as np
import optax
import pytest
import torch
import transformers

from vlmjax.train.optimizer import OptimConfig, make_optimizer, resolve_lr, schedule

STEPS = 20
LRS = {
    "vision/patch/kernel": 2e-2,
    "vision/norm/scale": 2e-2,
    "llm/embed/embedding": 5e-3,
    "llm/q/bias": 5e-3,
}
SHAPES = dict(zip(LRS, [(6, 5), (5,), (7, 4), (4,)], strict=True))
TORCH_SCHEDULES = {
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "linear": transformers.get_linear_schedule_with_warmup,
}


def _draws(seed):
    rng = np.random.default_rng(seed)
    return {p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}


def _torch_run(wd, kind, ratio):
    """(parameters, lr factor) of each step of torch; schedules step last, as in Trainer."""
    params = {p: torch.nn.Parameter(torch.tensor(x)) for p, x in _draws(0).items()}
    groups = [
        {"params": [x], "lr": LRS[p], "weight_decay": wd if x.ndim == 2 else 0.0}
        for p, x in params.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
    warmup = math.ceil(STEPS * ratio)  # TrainingArguments.get_warmup_steps
    scheduler = TORCH_SCHEDULES[kind](optimizer, warmup, STEPS)
    states, rates = [], []
    for step in range(STEPS):
        for p, g in _draws(step + 1).items():
            params[p].grad = torch.tensor(g)
        rates.append(optimizer.param_groups[0]["lr"] / LRS[next(iter(LRS))])
        optimizer.step()
        scheduler.step()
        states.append({p: x.detach().numpy().copy() for p, x in params.items()})
    return states, rates


@pytest.mark.parametrize(
    ("wd", "kind", "ratio"), [(0.0, "cosine", 0.22), (0.1, "cosine", 0.0), (0.1, "linear", 0.5)]
)
def test_adamw_and_schedule_equal_torch_and_transformers(wd, kind, ratio):
    cfg = OptimConfig(b2=0.98, wd=wd, schedule=kind, warmup=ratio)
    optimizer = make_optimizer(cfg, LRS, STEPS)
    params = _draws(0)
    opt, update = optimizer.init(params), jax.jit(optimizer.update)
    states, rates = _torch_run(wd, kind, ratio)
    factor = jax.jit(schedule(cfg, STEPS))
    np.testing.assert_allclose([factor(s) for s in range(STEPS)], rates, atol=1e-6)
    for step, want in enumerate(states):
        updates, opt = update(_draws(step + 1), opt, params)
        params = optax.apply_updates(params, updates)
        for p in params:
            np.testing.assert_allclose(params[p], want[p], atol=2e-6, err_msg=f"{p}, step {step}")


def test_warmup_starts_at_zero_and_peaks_after_it():
    """As in Trainer: 0 at the first step, the peak at step `warmup`, which is rounded up."""
    factor = schedule(OptimConfig(schedule="constant", warmup=0.11), STEPS)  # 2.2 -> 3 steps
    np.testing.assert_allclose(
        [float(factor(s)) for s in range(5)], [0, 1 / 3, 2 / 3, 1, 1], rtol=1e-6
    )


def _clipped(kind, at):
    cfg = OptimConfig(name="sgd", b1=0.0, clip=kind, clip_at=at, schedule="constant", warmup=0.0)
    optimizer = make_optimizer(cfg, dict.fromkeys(LRS, 1.0), STEPS)
    params = _draws(0)
    return {
        p: -np.asarray(u)
        for p, u in optimizer.update(_draws(1), optimizer.init(params), params)[0].items()
    }


def test_clipping():
    grads = _draws(1)
    for p, g in _clipped("none", 0.1).items():
        np.testing.assert_array_equal(g, grads[p])
    tensors = {p: torch.nn.Parameter(torch.zeros(g.shape)) for p, g in grads.items()}
    for clip, kind, at in (
        (torch.nn.utils.clip_grad_norm_, "global_norm", 0.7),
        (torch.nn.utils.clip_grad_norm_, "global_norm", 1e3),  # above the norm: nothing happens
        (torch.nn.utils.clip_grad_value_, "value", 0.3),
    ):
        for p, x in tensors.items():
            x.grad = torch.tensor(grads[p])
        clip(list(tensors.values()), at)
        for p, g in _clipped(kind, at).items():
            np.testing.assert_allclose(g, tensors[p].grad, rtol=1e-5, err_msg=f"{kind} {p}")
    for p, g in _clipped("block_rms", 0.5).items():
        rms = np.sqrt(np.square(grads[p]).mean())
        np.testing.assert_allclose(g, grads[p] * min(1, 0.5 / rms), rtol=1e-5, err_msg=p)


def test_first_row_of_the_lr_table_wins():
    table = (("vision/norm/.*", None), ("vision/.*", 1e-3), (".*/bias", 1e-4), (".*", 1e-5))
    assert resolve_lr(table, LRS) == {
        "vision/patch/kernel": 1e-3,
        "vision/norm/scale": None,
        "llm/embed/embedding": 1e-5,
        "llm/q/bias": 1e-4,
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((("vision/.*", 1e-3),), r"no row matches \['llm/embed/embedding', 'llm/q/bias'\]"),
        ((("vison/.*", 1e-3), (".*", None)), r"no parameter matches \['vison/.\*'\]"),
        (
            (("llm", None), ("vision/.*", 1e-3)),
            r"(?s)no row matches.*no parameter matches \['llm'\]",
        ),
        ((), r"no row matches .*paths start with \['llm', 'vision'\], e.g. \("),
    ],
)
def test_lr_table_that_does_not_fit(table, message):
    with pytest.raises(ValueError, match=message):
        resolve_lr(table, LRS)


@pytest.mark.parametrize("wrong", [dict(name="adam"), dict(clip="norm"), dict(schedule="cosin")])
def test_unknown_choices_name_the_known(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"optim\.{key}='{value}' is unknown; choose one of \['"):
        make_optimizer(OptimConfig(**wrong), LRS, STEPS)
