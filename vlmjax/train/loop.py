"""The training loop, top to bottom: build, shard, restore; then data, step, log, save."""

import dataclasses
import json
import math
import signal
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from vlmjax import build, checkpoint, hf, sharding
from vlmjax.data.stream import Position, packed_batches, prefetch
from vlmjax.nn import flatten
from vlmjax.objectives import OBJECTIVES
from vlmjax.train import flops, metrics
from vlmjax.train.optimizer import choose, make_optimizer, resolve_lr, schedule
from vlmjax.train.step import init_state, make_train_step


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite; names the step and the records in its batch."""


def check_init(init, stage):
    """Returns {module: source} of a dict, else {}; ValueError for an empty or unknown source."""
    if init == "":
        raise ValueError(
            f"init of stage {stage} is empty; it needs the work directory of the stage before; "
            "give --config.init=DIR"
        )
    sources = init if isinstance(init, dict) else {}
    empty = [module for module, source in sources.items() if source == ""]
    if empty:
        raise ValueError(
            f"stage {stage} starts from weights that are not given: init of {', '.join(empty)} is "
            "empty; allowed are the directory of a Hugging Face checkpoint or a random start; give "
            + " ".join(f"--config.init.{module}=hf:DIR" for module in empty)
            + " (or =random)"
        )
    for module, source in sources.items():
        known = source in (None, "random") or (isinstance(source, str) and source.startswith("hf:"))
        if module not in ("vision", "connector", "llm") or not known:
            raise ValueError(
                f"init[{module!r}]={source!r} is not allowed: init is None, a work directory, or a "
                "dict from vision, connector, llm to 'hf:DIR' or 'random'; change that entry"
            )
    return {module: source for module, source in sources.items() if source not in (None, "random")}


def initial_params(run, shapes, where):
    """Returns {path: array} to start from.

    Args:
      run: a `build.Run`. `init` is None (random), the work directory of an earlier stage, or
        {"vision" | "connector" | "llm": "hf:DIR", or "random" or None}. An empty string stands for
        what the command line must give.
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
        build.check_params(
            loaded, {p: s for p, s in shapes.items() if p.startswith(f"{module}/")}, source
        )
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
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
    )
    arrays, meta = checkpoint.restore(folder, like._asdict())
    return type(abstract)(**arrays), Position(meta["position"][0], tuple(meta["position"][1]))


def check_finite(step, values, ids):
    """Raises `NonFiniteLoss` when the loss or a gradient norm of a step is not a number."""
    bad = {k: float(v) for k, v in values.items() if not math.isfinite(v)}
    if bad:
        raise NonFiniteLoss(
            f"{', '.join(f'{k} is {v}' for k, v in bad.items())} at step {step}; training stopped, "
            f"the last saved checkpoint is good. The records of that batch: {', '.join(ids)}. "
            "Lower the learning rate, set optim.clip='global_norm', or look at these records"
        )


def open_batches(run, position):
    """Returns the iterator of `PackedBatch`es from a `Position` on, made in a thread."""
    stream, processor = build.make_data(run)
    batches = packed_batches(
        stream,
        processor,
        build.make_budget(run),
        run.train.rows,
        pool=run.data.pool,
        patch_dim=run.model.vision.patch_dim,
        normalisation=run.data.normalisation,
        position=position,
    )
    return prefetch(batches)


def throughput(run, window, seconds, trained):
    """Returns the metrics of the steps since the last log line.

    Args:
      run: a `build.Run`.
      window: the `data.pack.Stats` of these steps.
      seconds: they took.
      trained: set of trained modules.
    """
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
    """Trains one stage in `workdir`, resuming what is there; returns its summary."""
    run, workdir = build.resolve(config), Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=1))
    stop = []  # preemption: save, then leave
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    mesh = sharding.make_mesh(**run.mesh)

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
        factor = schedule(run.optim, run.train.steps)

        start, batches = int(state.step), open_batches(run, position)
        window, waited, pending, losses = [], 0.0, None, {}
        began = last = time.monotonic()
        with (
            metrics.Writer(workdir, run.train.steps, start, tensorboard) as writer,
            checkpoint.Saver(workdir, run.train.keep) as saver,
        ):
            for step in range(start + 1, run.train.steps + 1):
                before = time.monotonic()
                packed = next(batches)
                waited += time.monotonic() - before
                batch = jax.tree.map(partial(sharding.place_rows, mesh), packed.batch)
                state, values = train_step(state, batch)

                # The step before is looked at while this one runs: the device never waits for the
                # host, except where something is written.
                stopped = bool(stop)
                last_step = step == run.train.steps or stopped
                log = step % run.train.log_every == 0 or step == start + 1 or last_step
                save = step % run.train.save_every == 0 or last_step
                unseen = [pending] * bool(pending) + [(step, values, packed.ids)] * (log or save)
                for done, done_values, ids in unseen:
                    check_finite(done, done_values, ids)
                    losses[done] = float(done_values["loss"])
                pending = (step, values, packed.ids)
                window.append(packed.stats)

                if log:
                    now = time.monotonic()
                    line = {k: float(v) for k, v in values.items()}
                    line["loss"] = float(
                        np.mean([losses[s] for s in losses if s > step - len(window)])
                    )
                    line["lr_factor"] = float(factor(step - 1))
                    line["data_wait"] = waited / (now - last)
                    writer.write(step, throughput(run, window, now - last, trained) | line)
                    window, waited, last = [], 0.0, now
                if save:
                    meta = {"position": packed.position, "stage": run.stage}
                    saver.save(step, state._asdict(), meta)
                if stopped:
                    writer.say(f"SIGTERM: step {step} is saved, the same command resumes it")
                    break
        batches.close()
        signal.signal(signal.SIGTERM, previous)
        seconds = time.monotonic() - began
        return summarise(run, workdir, int(state.step), train_step._cache_size(), losses, seconds)


def summarise(run, workdir, step, compiles, losses, seconds):
    """Writes loss.png and summary.json of a stage; returns the summary of all sessions."""
    file, losses = workdir / "summary.json", list(losses.values())
    before = json.loads(file.read_text()) if file.exists() else {}
    if not losses:
        return before
    ends = max(min(20, len(losses) // 2), 1)
    summary = {
        "stage": run.stage,
        "steps": step,
        "seconds": round(seconds + before.get("seconds", 0), 1),
        "compiles": compiles,
        "loss_first": before.get("loss_first", float(np.mean(losses[:ends]))),
        "loss_last": float(np.mean(losses[-ends:])),
    }
    if jax.process_index() == 0:
        metrics.plot_curve(workdir, f"stage {run.stage}")
        file.write_text(json.dumps(summary, indent=1))
    return summary
