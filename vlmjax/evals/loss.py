"""Teacher-forced loss of held-out samples, in one compiled program whatever their sizes."""

import contextlib
import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from vlmjax import build
from vlmjax.batch import Budget
from vlmjax.data import held_out
from vlmjax.data.loading import load
from vlmjax.data.pack import check_fits, first_fit, pack
from vlmjax.generate.chat import Chat
from vlmjax.nn import bind
from vlmjax.objectives.sft import token_losses


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _losses(graphdef, params, batch):
    return token_losses(bind(graphdef, params), batch)


def summed(generator, batch):
    """Returns (sum of the losses of supervised tokens in nats, number of these tokens)."""
    values = _losses(generator.graphdef, generator.params, batch)
    supervised = batch.weights > 0
    return float(np.asarray(values, np.float64)[supervised].sum()), int(supervised.sum())


def mean_loss(generator, samples, budget, rows):
    """Returns (mean loss in nats per supervised token, number of these tokens).

    Args:
      generator: a `Generator`, for its model.
      samples: list of `Sample`.
      budget: `Budget` of the rows they are packed into.
      rows: packed rows that run together.
    """
    sizes = {id(s): check_fits(s, budget) for s in samples}
    slots = np.maximum(budget.limits, 1)
    waiting = sorted(samples, key=lambda s: max(np.divide(sizes[id(s)], slots)), reverse=True)
    total = tokens = 0
    while waiting:
        places = first_fit([sizes[id(s)] for s in waiting], rows, budget)
        chosen = [[] for _ in range(rows)]
        for sample, row in zip(waiting, places, strict=True):
            if row is not None:
                chosen[row].append(sample)
        waiting = [s for s, row in zip(waiting, places, strict=True) if row is None]
        loss, supervised = summed(generator, pack(chosen, budget, generator.config.form)[0])
        total, tokens = total + loss, tokens + supervised
    return total / max(tokens, 1), tokens


def run(config, workdir, output):
    """Writes the loss of a run on held-out records to report.json; returns the report.

    The records are those that `EvalConfig` says; of a config without any, records of the sources it
    trains on, which the report says, since the model has seen them. Those that cannot be used are
    in the report by id and reason.

    Args:
      config: ConfigDict of the run.
      workdir: the run, for its newest checkpoint.
      output: folder of report.json.
    """
    resolved = build.resolve(config)
    settings = resolved.eval
    unseen = bool(settings.sources or any(s.held_out for s in resolved.data.mixed))
    if unseen:
        parts = build.open_held_out(resolved)
    else:
        print("these are the sources the run trains on: name held-out ones in eval.sources")
        data = build.open_data(resolved)
        opened = zip(data.names, data.sources, data.processors, strict=True)
        parts = [held_out.some(*one, settings.samples, settings.seed) for one in opened]
    chat, found = Chat.from_run(workdir, config), {}
    budget = Budget.largest(build.make_budgets(resolved))
    parts, sizes, listed = zip(*(held_out.measured(part, budget) for part in parts), strict=True)
    rows = held_out.Rounds(parts, sizes, budget, 1, (0,), resolved.model.form)
    how = resolved.data
    packed = load(rows, workers=how.workers, ahead=how.ahead, stall=how.stall)
    with contextlib.closing(packed):
        for part, steps, bad in zip(parts, rows.steps, listed, strict=True):
            total, tokens, n = 0.0, 0, 0
            unusable = {one["id"]: one["reason"] for one in bad}
            for row in tqdm(itertools.islice(packed, steps), part.name, steps, unit="row"):
                loss, supervised = summed(chat.generator, row.batch)
                total, tokens, n = total + loss, tokens + supervised, n + len(row.ids)
                unusable |= {one.id: one.reason for one in row.bad}
            mean = total / tokens if tokens else None
            found[part.name] = {"loss": mean, "tokens": tokens, "n": n, "unusable": unusable}
            shown = "unknown" if mean is None else f"{mean:.4f}"
            said = f"loss {shown}  {tokens} tokens of {n} records, {len(unusable)} cannot be used"
            print(f"{part.name}  {said}", flush=True)
    report = {"held_out": unseen, "sources": found}
    Path(output).mkdir(parents=True, exist_ok=True)
    (Path(output) / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report
