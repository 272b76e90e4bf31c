"""Teacher-forced loss of held-out samples, in one compiled program whatever their sizes."""

import functools
import json
from pathlib import Path

import jax
import numpy as np

from vlmjax import build
from vlmjax.batch import Budget
from vlmjax.data.pack import check_fits, first_fit, pack
from vlmjax.data.sources import open_source
from vlmjax.evals.config import EvalConfig
from vlmjax.generate.chat import Chat
from vlmjax.nn import bind
from vlmjax.objectives.sft import token_losses


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _losses(graphdef, params, batch):
    return token_losses(bind(graphdef, params), batch)


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
        batch, stats = pack(chosen, budget, generator.config.form)
        values = _losses(generator.graphdef, generator.params, batch)
        total += float(np.asarray(values, np.float64)[batch.weights > 0].sum())
        tokens += stats.supervised
    return total / max(tokens, 1), tokens


def run(config, workdir, output):
    """Writes the loss of a run on held-out sources to report.json; returns the report.

    The sources are those of the config's `eval` section; where it names none, those of `data`,
    which the report says, since the model has seen them.

    Args:
      config: ConfigDict of the run.
      workdir: the run, for its newest checkpoint.
      output: folder of report.json.
    """
    resolved = build.resolve(config)
    settings = build.section(EvalConfig, resolved.eval, "eval")
    specs = settings.sources or tuple(s.spec for s in resolved.data.mixed)
    chat = Chat.from_run(workdir, config)
    found = {}
    for spec in specs:
        source = open_source(spec, resolved.data.media_root, settings.seed)
        count = settings.samples
        if hasattr(source, "__len__"):
            count = min(count, len(source))
        samples = [chat.processor(source[i]) for i in range(count)]
        budget = Budget.largest(build.make_budgets(resolved))
        loss, tokens = mean_loss(chat.generator, samples, budget, resolved.train.rows)
        found[spec] = {"loss": loss, "tokens": tokens, "n": count}
        print(f"{spec}  loss {loss:.4f}  {tokens} tokens of {count} records", flush=True)
    report = {"held_out": bool(settings.sources), "sources": found}
    if not settings.sources:
        print("these are the sources the run trains on: name held-out ones in eval.sources")
    Path(output).mkdir(parents=True, exist_ok=True)
    (Path(output) / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report
