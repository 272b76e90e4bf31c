"""The training loop, top to bottom: build, shard, restore; then data, step, log, save."""

import json
import math
import time
from pathlib import Path

import jax

from vlmjax import build, checkpoint, hf, sharding
from vlmjax.nn import flatten
from vlmjax.train import flops, metrics
from vlmjax.train.cluster import preemption
from vlmjax.train.feed import open_feed
from vlmjax.train.held_out import HeldOutLoss
from vlmjax.train.optimizer import schedule
from vlmjax.train.profile import traced
from vlmjax.train.program import batch_shapes, make_program
from vlmjax.train.step import TrainState
from vlmjax.train.watch import Watch

# How a config, and a command line, say that weights start at random.
RANDOM = (None, "random", "None")


def check_init(init, stage, modules=("vision", "connector", "llm")):
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
        known = source in RANDOM or (isinstance(source, str) and source.startswith("hf:"))
        if module not in modules or not known:
            raise ValueError(
                f"init[{module!r}]={source!r} is not allowed: init is 'random', a work directory, "
                f"'hf:DIR', or a dict from {', '.join(modules)} to 'hf:DIR' or 'random'; change "
                "that entry"
            )
    return {module: source for module, source in sources.items() if source not in RANDOM}


def initial_params(run, shapes, where):
    """Returns {path: array} to start from.

    Args:
      run: a `build.Run`. `init` is None or "random", the work directory of an earlier stage,
        "hf:DIR" with a whole model, or {"vision" (or each of several encoders) | "connector" |
        "llm": "hf:DIR", or "random" or None}. An empty string stands for what the command line
        must give.
      shapes: {path: ShapeDtypeStruct} of the model.
      where: {path: sharding}.
    """
    encoders = run.model.encoders or ("vision",)
    sources = check_init(run.init, run.stage, (*encoders, "connector", "llm"))
    if isinstance(run.init, str) and run.init.startswith("hf:"):
        loaded = flatten(hf.load_params(run.init[3:], run.model))
        build.check_params(loaded, shapes, run.init)
        return {p: sharding.place(x, where[p]) for p, x in loaded.items()}
    if isinstance(run.init, str) and run.init not in RANDOM:

        def place(saved):
            build.check_params(saved, shapes, run.init)
            return where

        return checkpoint.restore_params(run.init, place)[0]
    params = build.random_params(run.model, run.train.seed, where)
    for module, source in sources.items():
        loaded = flatten(_load_module(module, source[3:], run.model), f"{module}/")
        # Blocks of SVA inside the decoder may be absent, which `_load_module` says.
        own = {p: s for p, s in shapes.items() if p.startswith(f"{module}/")}
        own = {p: s for p, s in own.items() if p in loaded or not p.startswith("llm/extra/")}
        build.check_params(loaded, own, source)
        params |= {p: sharding.place(x, where[p]) for p, x in loaded.items()}
    return params


def _load_module(module, directory, model):
    """Returns the nested weights of a module, and says which of them the directory lacks."""
    if module != "llm":
        return hf.load_module(module, directory, model)
    loaded, notes = hf.load_decoder(directory, model)
    for note in notes:
        print(f"{directory}: {note}", flush=True)
    return loaded


def make_workdir(workdir):
    """Returns the folder of a run; ValueError for a URL."""
    if "://" in str(workdir):
        raise ValueError(
            f"workdir={workdir} is a URL, a folder is needed: mount the bucket (gcsfuse for gs://) "
            "and give the path"
        )
    Path(workdir).mkdir(parents=True, exist_ok=True)
    return Path(workdir)


def write_config(config, workdir, start):
    """Writes config.json; returns lines on what differs from the one that the steps before had.

    Where something does, that one is kept as config_until_STEP.json.
    """
    file, text = workdir / "config.json", config.to_json_best_effort(indent=1)
    before = file.read_text() if file.exists() else text
    old, new = (_leaves(json.loads(x)) for x in (before, text))
    keys = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    if keys and start:
        (workdir / f"config_until_{start}.json").write_text(before)
    file.write_text(text)
    lines = (f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys)
    return [f"from step {start + 1} on {line}" for line in lines]


def _leaves(tree, prefix=""):
    """Returns {dotted name: value} of nested dicts."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for key, x in tree.items() for k, v in _leaves(x, f"{prefix}{key}.").items()}


def make_state(run, program, workdir):
    """Returns (TrainState on the mesh, meta of its checkpoint): from `workdir`, or fresh, None.

    Raises:
      ValueError: what is in `workdir` is of another stage.
    """
    folder = checkpoint.newest(workdir)
    if folder is None:
        params = initial_params(run, program.shapes, program.where)
        placed = jax.tree.map(lambda x: x.sharding, program.state)
        fresh = jax.jit(program.fresh, out_shardings=placed, donate_argnums=0)
        return fresh(params), None
    arrays, meta = checkpoint.restore(folder, program.state._asdict())
    if meta["stage"] != run.stage:
        raise ValueError(
            f"{workdir} holds a run of stage {meta['stage']}, the config is of stage {run.stage}: "
            "give each stage a workdir of its own"
        )
    return TrainState(**arrays), meta


def compile_steps(run, budgets, program, mesh, say):
    """Returns the compiled train step of each bucket, so that no later step has to compile."""
    compiled = []
    for budget in budgets:
        began = time.monotonic()
        lowered = program.step.lower(program.state, batch_shapes(run, budget, mesh))
        compiled.append(lowered.compile())
        say(
            f"compiled the step for rows of {budget.tokens} tokens and {sum(budget.patches)} "
            f"patches in {time.monotonic() - began:.1f} s"
        )
    return compiled


def fill(window, budgets):
    """Returns {name: share of token or patch slots in use, None without slots} of some steps."""
    shares = {}
    sizes = {"token_fill": [b.tokens for b in budgets]}
    sizes["patch_fill"] = [sum(b.patches) for b in budgets]
    for name, size in sizes.items():
        slots = sum(size[bucket] for bucket, _ in window)
        used = sum(getattr(stats, name) * size[bucket] for bucket, stats in window)
        shares[name] = used / slots if slots else None
    return shares


def throughput(run, budgets, window, seconds, trained):
    """Returns the metrics of the steps since the last log line.

    Args:
      run: a `build.Run`.
      budgets: of the buckets.
      window: (bucket, `data.pack.Stats`) of these steps.
      seconds: they took.
      trained: set of trained modules.
    """
    stats, by_bucket = [s for _, s in window], {}
    for bucket in sorted({bucket for bucket, _ in window}) if len(budgets) > 1 else ():
        part = [step for step in window if step[0] == bucket]
        values = {"steps": len(part)} | fill(part, budgets)
        by_bucket |= {f"bucket{bucket}/{name}": value for name, value in values.items()}
    names = ("samples", "tokens", "supervised", "visual", "visual_before_pruning")
    total = {name: sum(getattr(s, name) for s in stats) for name in names}
    work = sum(sum(flops.train_flops(run.model, s, trained).values()) for s in stats)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "seconds_per_step": seconds / len(window),
        "peak_memory_gib": memory and memory / 2**30,  # of a device of this host; None on CPU
        "samples_per_second": total["samples"] / seconds,
        "tokens_per_second": total["tokens"] / seconds,
        "patches_per_second": sum(sum(s.patches) for s in stats) / seconds,
        "supervised_tokens": total["supervised"] / len(window),
        **fill(window, budgets),
        **by_bucket,
        "visual_kept": total["visual"] / max(total["visual_before_pruning"], 1),
        "tflops_per_second": work / seconds / 1e12,
        "mfu": flops.mfu(work, seconds),
    }


def train(config, workdir, tensorboard=False, profile=None):
    """Trains one stage in `workdir`, resuming what is there; returns its summary.

    Args:
      config: a ConfigDict.
      workdir: folder of the run.
      tensorboard: also write TensorBoard events.
      profile: (first, last) step to trace into `workdir/profile`, or None.
    """
    run, workdir = build.resolve(config), make_workdir(workdir)
    mesh = sharding.make_mesh(**run.mesh)

    with jax.set_mesh(mesh), preemption() as preempted:
        program = make_program(run, mesh)
        state, saved = make_state(run, program, workdir)
        start, changed = int(state.step), []
        if jax.process_index() == 0:  # what was refused above leaves the one of before
            changed = write_config(config, workdir, start)
        factor = schedule(run.optim, run.train.steps)

        budgets = build.make_budgets(run)
        feed = open_feed(run, budgets, mesh, saved, start, workdir)
        steps = traced(range(start + 1, run.train.steps + 1), profile, workdir / "profile")
        train_steps, window, waited, pending, watch = [], [], 0.0, [], Watch()
        began = time.monotonic()
        with (
            metrics.Writer(workdir, run.train.steps, start, tensorboard) as writer,
            checkpoint.Saver(workdir, run.train.keep) as saver,
            HeldOutLoss(run, budgets, mesh, program, feed, start, writer.say) as held_out,
        ):
            for line in changed + feed.notes:
                writer.say(line)
            if start < run.train.steps:
                train_steps = compile_steps(run, budgets, program, mesh, writer.say)
            last = time.monotonic()
            for step in steps:
                before = time.monotonic()
                packed = next(feed.batches)
                waited += time.monotonic() - before
                feed.record(packed)
                batch = feed.place(mesh, packed.batch, run.train.rows)
                state, values = train_steps[packed.bucket](state, batch)

                # The step before is looked at while this one runs: the device never waits for the
                # host, except where something is written.
                stopped = preempted(step)
                last_step = step == run.train.steps or stopped
                log = step % run.train.log_every == 0 or step == start + 1 or last_step
                save = step % run.train.save_every == 0 or last_step
                pending.append((step, values, packed.ids))
                seen = pending if log or save else pending[:-1]
                for said in filter(None, [watch.see(*one) for one in seen]):
                    writer.say(said)
                pending = pending[len(seen) :]
                window.append((packed.bucket, packed.stats))

                if save:
                    meta = {"position": packed.position, "stage": run.stage}
                    meta["identity"] = feed.identity
                    saver.save(step, state._asdict(), meta)
                if log:
                    now = time.monotonic()
                    line = {k: float(v) for k, v in values.items() if math.isfinite(v)}
                    line |= watch.line()
                    line["lr_factor"] = float(factor(step - 1))
                    line["data_wait"] = waited / (now - last)
                    line |= {} if stopped else held_out(state, step)
                    totals = feed.totals([stats for _, stats in window], run.train.rows)
                    window = [(bucket, s) for (bucket, _), s in zip(window, totals, strict=True)]
                    counts = throughput(run, budgets, window, now - last, program.trained)
                    writer.write(step, counts | line | feed.health(packed.position))
                    window, waited, last = [], 0.0, now + line.get("held_out_seconds", 0.0)
                if stopped:
                    writer.say(f"SIGTERM: step {step} is saved, the same command resumes it")
                    break
        feed.batches.close()
        seconds = time.monotonic() - began
        return summarise(run, workdir, int(state.step), len(train_steps), watch.ends(), seconds)


def summarise(run, workdir, step, compiles, ends, seconds):
    """Writes loss.png and summary.json of a stage; returns the summary of all sessions.

    Args:
      run: a `build.Run`.
      workdir: folder of the run.
      step, compiles, seconds: of this session.
      ends: mean of its first and of its last losses, None where it had none.
    """
    file = workdir / "summary.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    if ends is None:
        return before
    summary = {
        "stage": run.stage,
        "steps": step,
        "seconds": round(seconds + before.get("seconds", 0), 1),
        "compiles": compiles,
        "loss_first": before.get("loss_first", ends[0]),
        "loss_last": ends[1],
    }
    if jax.process_index() == 0:
        metrics.plot_curve(workdir, f"stage {run.stage}")
        file.write_text(json.dumps(summary, indent=1))
    return summary
