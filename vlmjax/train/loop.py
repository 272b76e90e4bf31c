"""The training loop, top to bottom: build, shard, restore, then for every step data, step, log, save."""

import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import jax
import numpy as np

from vlmjax import build, checkpoint, hf, sharding
from vlmjax.data.stream import Position, packed_batches, prefetch
from vlmjax.objectives import OBJECTIVES
from vlmjax.train import flops, metrics
from vlmjax.train.optimizer import choose, make_optimizer, resolve_lr, schedule
from vlmjax.train.step import flatten, init_state, make_train_step


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite; names the step and the records in its batch."""


def check_init(init, stage):
    """Returns {module: source} of a dict, {} otherwise; ValueError for a source that is empty or unknown."""
    if init == "":
        raise ValueError(
            f"init of stage {stage} is empty; it needs the work directory of the stage before; give --config.init=DIR"
        )
    sources = init if isinstance(init, dict) else {}
    empty = [module for module, source in sources.items() if source == ""]
    if empty:
        raise ValueError(
            f"stage {stage} starts from weights that are not given: init of {', '.join(empty)} is empty; allowed are "
            "the directory of a Hugging Face checkpoint or a random start; give "
            + " ".join(f"--config.init.{module}=hf:DIR" for module in empty)
            + " (or =random)"
        )
    for module, source in sources.items():
        known = source in (None, "random") or (isinstance(source, str) and source.startswith("hf:"))
        if module not in ("vision", "connector", "llm") or not known:
            raise ValueError(
                f"init[{module!r}]={source!r} is not allowed: init is None, a work directory, or a dict from vision, "
                "connector, llm to 'hf:DIR' or 'random'; change that entry"
            )
    return {module: source for module, source in sources.items() if source not in (None, "random")}


def initial_params(run, shapes, where):
    """Returns {path: array} to start from.

    Args:
      run: a `build.Run`. `init` is None (random), the work directory of an earlier stage, or {"vision" | "connector" |
        "llm": "hf:DIR", or "random" or None}. An empty string stands for what the command line must give.
      shapes: {path: ShapeDtypeStruct} of the model.
      where: {path: sharding}.
    """
    sources = check_init(run.init, run.stage)
    if isinstance(run.init, str):
        params, _ = checkpoint.restore_params(run.init)
        build.check_params(params, shapes, run.init)
        return jax.device_put(params, where)
    params = build.random_params(run.model, run.train.seed, where)
    for module, source in sources.items():
        loaded = flatten(hf.load_module(module, source[3:], run.model), f"{module}/")
        build.check_params(loaded, {p: s for p, s in shapes.items() if p.startswith(f"{module}/")}, source)
        params |= {p: jax.device_put(x, where[p]) for p, x in loaded.items()}
    return params


def make_state(run, shapes, axes, lrs, optimizer, mesh, workdir):
    """Returns (TrainState on the mesh, Position of the data): restored from `workdir`, or fresh."""
    where = build.shardings(shapes, axes, mesh)

    def fresh(params):
        return init_state(params, lrs, optimizer, run.train.frozen_dtype)

    def place(path, x):
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return where.get(keys[-1], replicated) if keys else replicated

    abstract = jax.eval_shape(fresh, shapes)
    placed = jax.tree_util.tree_map_with_path(place, abstract)
    folder = checkpoint.newest(workdir)
    if folder is None:
        params = initial_params(run, shapes, where)
        return jax.jit(fresh, out_shardings=placed, donate_argnums=0)(params), Position()
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)
    arrays, meta = checkpoint.restore(folder, like._asdict())
    return type(abstract)(**arrays), Position(meta["position"][0], tuple(meta["position"][1]))


def check_finite(step, loss, ids):
    """Raises `NonFiniteLoss` when the loss of a step is not a number."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"loss is {loss} at step {step}; training stopped, the last saved checkpoint is good. The records of that "
            f"batch: {', '.join(ids)}. Lower the learning rate, set optim.clip='global_norm', or look at these records"
        )


def throughput(run, window, seconds, trained):
    """Returns the metrics of the steps since the last log line, from their `data.pack.Stats`."""
    total = {f.name: sum(getattr(s, f.name) for s in window) for f in dataclasses.fields(window[0])}
    work = sum(sum(flops.train_flops(run.model, s, trained).values()) for s in window)
    return {
        "samples_per_second": total["samples"] / seconds,
        "tokens_per_second": total["tokens"] / seconds,
        "patches_per_second": total["patches"] / seconds,
        "supervised_tokens": total["supervised"] / len(window),
        "token_fill": total["token_fill"] / len(window),
        "patch_fill": total["patch_fill"] / len(window),
        "visual_kept": total["visual"] / max(total["visual_before_pruning"], 1),
        "tflops_per_second": work / seconds / 1e12,
        "mfu": flops.mfu(work, seconds),
    }


def train(config, workdir, tensorboard=False):
    """Trains one stage in `workdir`, resuming what is there; returns its summary (also in summary.json)."""
    run = build.resolve(config)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=1))
    mesh = sharding.make_mesh(**run.mesh)
    stop = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # preemption: save, then leave

    with jax.set_mesh(mesh):
        graphdef, shapes, axes = build.abstract(run.model)
        lrs = resolve_lr(run.lr, shapes)
        peaks = {path: lr for path, lr in lrs.items() if lr is not None}
        trained = {path.split("/")[0] for path in peaks}
        optimizer = make_optimizer(run.optim, peaks, run.train.steps)
        objective = choose(OBJECTIVES, run.objective, "objective")
        state, position = make_state(run, shapes, axes, lrs, optimizer, mesh, workdir)
        step_fn = make_train_step(graphdef, objective, optimizer, run.train.accumulate)
        placed = jax.tree.map(lambda x: x.sharding, state)
        train_step = jax.jit(step_fn, donate_argnums=0, out_shardings=(placed, None))

        start = int(state.step)
        stream, processor = build.make_data(run)
        batches = prefetch(
            packed_batches(
                stream,
                processor,
                build.make_budget(run),
                run.train.rows,
                pool=run.data.pool,
                patch_dim=run.model.vision.patch_dim,
                normalisation=run.data.normalisation,
                position=position,
            )
        )
        factor = schedule(run.optim, run.train.steps)
        rows = sharding.row_sharding(mesh)
        window, waited, pending, losses = [], 0.0, None, {}
        began = last = time.monotonic()

        with metrics.Writer(workdir, run.train.steps, start, tensorboard) as writer, checkpoint.Saver(
            workdir, run.train.keep
        ) as saver:
            for step in range(start + 1, run.train.steps + 1):
                before = time.monotonic()
                packed = next(batches)
                waited += time.monotonic() - before
                batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), packed.batch)
                state, values = train_step(state, batch)

                # The loss of the step before is looked at while this one runs, so the device never waits for the host.
                if pending is not None:
                    losses[step - 1] = float(pending[0])
                    check_finite(step - 1, losses[step - 1], pending[1])
                pending, position = (values["loss"], packed.ids), packed.position
                window.append(packed.stats)

                done = step == run.train.steps or bool(stop)
                if step % run.train.log_every == 0 or step == start + 1 or done:
                    losses[step] = float(values["loss"])
                    check_finite(step, losses[step], packed.ids)
                    now = time.monotonic()
                    line = throughput(run, window, now - last, trained) | {k: float(v) for k, v in values.items()}
                    line["loss"] = float(np.mean([losses[s] for s in range(step - len(window) + 1, step + 1)]))
                    line |= {"lr_factor": float(factor(step - 1)), "data_wait": waited / (now - last)}
                    writer.write(step, line)
                    window, waited, last = [], 0.0, now
                if step % run.train.save_every == 0 or done:
                    check_finite(step, float(values["loss"]), packed.ids)
                    saver.save(step, state._asdict(), {"position": position, "stage": run.stage})
                if stop:
                    writer.say(f"stopped by SIGTERM; step {step} is saved, the same command resumes it")
                    break
        batches.close()

    signal.signal(signal.SIGTERM, previous)
    return summarise(run, workdir, train_step, list(losses.values()), time.monotonic() - began)


def summarise(run, workdir, train_step, losses, seconds):
    """Writes loss.png and summary.json of a stage; returns the summary."""
    ends = max(min(20, len(losses) // 2), 1)
    summary = {
        "stage": run.stage,
        "steps": run.train.steps,
        "seconds": round(seconds, 1),
        "compiles": train_step._cache_size(),
        "loss_first": float(np.mean(losses[:ends])) if losses else None,
        "loss_last": float(np.mean(losses[-ends:])) if losses else None,
    }
    if jax.process_index() == 0 and losses:
        metrics.plot_curve(workdir, f"stage {run.stage}")
        (workdir / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary
