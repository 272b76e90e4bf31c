"""VideoLLaMA3-2B, stage 2, on one GPU: our training step against transformers + torch.

python tests/benchmarks/gpu_step.py                             an H200 (about 15 minutes)
python tests/benchmarks/gpu_step.py --size tiny --device cpu    the same path on a CPU, no figure

Samples are a native-resolution mixture with the lengths of the real thing: of eight, five images of
256 to 8192 patches (a token each), two videos of 4 to 16 frames (a token for four patches) and one
of text only, with 32 to 1024 tokens of text. Both sides start from the same weights, train all of
them, see every sample once in a pass, and keep their loss on answers only; losses before the first
step must agree. We train packed rows of 16,384 tokens with f32 masters and moments, transformers
right-padded batches with bf16 weights and moments (which favours it), fused AdamW and gradient
checkpointing, in the order of the list and, `grouped`, with batches of samples of like length. It
runs flash_attention_2 where that can be imported, otherwise sdpa. Each side has a process of its
own, so that peak memory is its own.

Prints a JSON line for each side, then one of ratios against each (above 1 = we are better).
`mfu_real` counts the FLOPs of real tokens and patches (`vlmjax.train.flops`): the only rule that
rewards no waste. `mfu_padded` also counts padded slots as work, as reports that multiply slots by
parameters do. No recomputation is counted in either. They are null without a known peak (a CPU).
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from train_step import IMAGE, ROOT, pad_right, timed

MODULES = {"vision", "connector", "llm"}
TINY = dict(
    vision=dict(width=144, mlp=288, layers=2, heads=2, patch=14),
    connector=dict(layers=2),
    llm=dict(vocab=800, width=128, mlp=384, layers=2, heads=2, kv_heads=1, head_dim=64),
)
# Of a side: (area of pictures as a share of the real one, budgets of the rows).
SIZES = {
    "2b": (1, ((16384, 32768, 16384, 4), (16384, 16384, 16384, 4))),
    "tiny": (1 / 64, ((1536, 1024, 512, 4), (1536, 512, 512, 4))),
}


def flags():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=tuple(SIZES), default="2b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3, help="passes over the samples")
    parser.add_argument("--sides", default="vlmjax,transformers,grouped")
    parser.add_argument("--rows", type=int, default=1, help="packed rows of a step")
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--vision-block", type=int, default=0)
    parser.add_argument("--llm-block", type=int, default=0)
    parser.add_argument("--batch", type=int, default=6, help="samples of a step of transformers")
    parser.add_argument("--torch-python", default=sys.executable, help="where torch is installed")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_run(args):
    """Returns the `build.Run` of the recipe's second stage, with the sizes of this benchmark."""
    from configs import videollama3
    from vlmjax import build

    config = videollama3.get_config("size=2b,stage=2,slice=h200-1")
    with config.unlocked():
        if args.size == "tiny":
            for name, sizes in TINY.items():
                config.model[name] = sizes
        config.model.compute.update(
            dtype="bfloat16" if args.device == "cuda" else "float32",
            remat=args.remat,
            vision_remat=args.remat,
            attention=args.attention,
            vision_block=args.vision_block,
            llm_block=args.llm_block,
        )
        config.data.budget, *buckets = SIZES[args.size][1]
        config.data.buckets = tuple(buckets)
        config.train.update(rows=args.rows, accumulate=1)
        config.optim.update(schedule="constant", warmup=0.0)
    return build.resolve(config)


def make_samples(args, cfg):
    """Returns the `Sample`s, the same for every side."""
    from vlmjax.data.sample import Item, Sample

    rng, share, samples = np.random.default_rng(0), SIZES[args.size][0], []

    def grid(low, high, merge):
        area, aspect = share * 2 ** rng.uniform(low, high) / merge**2, 2 ** rng.uniform(-1, 1)
        return tuple(merge * max(1, round((area * a) ** 0.5)) for a in (aspect, 1 / aspect))

    for i in range(args.samples):
        text, frames, merge, size = round(2 ** rng.uniform(5, 10)), 1, 1, None
        if i % 8 in (2, 5):
            frames, merge, size = int(rng.integers(4, 17)), 2, grid(8.5, 10.25, 2)
        elif i % 8 != 7:
            size = grid(8, 13, 1)
        items = []
        for _ in range(frames if size else 0):
            pixels = rng.integers(0, 256, (size[0] * size[1], 588), dtype=np.uint8)
            items.append(Item(pixels, size, merge, np.ones(len(pixels) // merge**2, bool)))
        visual = np.full(sum(len(item.keep) for item in items), IMAGE, np.int32)
        words = rng.integers(2, cfg.llm.vocab, text).astype(np.int32)
        tokens = np.concatenate([words[:4], visual, words[4:]])
        answer = np.arange(len(tokens)) >= len(visual) + max(text // 3, 4)
        labels = np.where(answer, tokens, -100).astype(np.int32)
        samples.append(Sample(f"{i}", tokens, labels, tuple(items), tokens == IMAGE))
    return samples


def pack_all(samples, rows, budgets):
    """Returns (bucket, Batch, Stats) of steps that see every sample once."""
    from vlmjax.batch import Budget, Form, TowerForm
    from vlmjax.data.pack import pack, size
    from vlmjax.data.stream import choose_bucket

    largest = Budget.largest(budgets)

    def share(sample):
        return max(np.divide(size(sample), np.maximum(largest.limits, 1)))

    waiting, steps = sorted(samples, key=share, reverse=True), []
    while waiting:
        sizes = [size(s) for s in waiting]
        bucket, places = choose_bucket(sizes, budgets, rows, urgent=True)
        placed = list(zip(waiting, places, strict=True))
        chosen = [[s for s, p in placed if p == row] for row in range(rows)]
        steps.append((bucket, *pack(chosen, budgets[bucket], Form((TowerForm(14),)))))
        waiting = [s for s, p in placed if p is None]
    return steps


def one_row(samples):
    """Returns (Batch, Stats) of a row as long as it takes."""
    from vlmjax.batch import Budget, Form, TowerForm
    from vlmjax.data.pack import pack, size

    budget = Budget(*(int(n) for n in np.sum([size(s) for s in samples], 0)[:3]))
    return pack([samples], budget, Form((TowerForm(14),)))


def make_model(args, run, samples):
    """Writes random weights of the model for transformers; both sides start from them."""
    from vlmjax import build, hf
    from vlmjax.data.processor import ProcessorConfig
    from vlmjax.data.tokenizer import byte_tokenizer
    from vlmjax.nn import unflatten

    params = unflatten(build.random_params(run.model, 0))
    dtype = run.model.compute.dtype
    hf.save_pretrained(args.folder, run.model, params, byte_tokenizer(), ProcessorConfig(), dtype)
    return {}


def run_vlmjax(args, run, samples):
    """Returns what was measured, and the loss of the first samples before the first step."""
    import jax

    from vlmjax import build, hf, sharding
    from vlmjax.nn import bind, flatten, unflatten
    from vlmjax.objectives import OBJECTIVES
    from vlmjax.train import flops
    from vlmjax.train.program import batch_shapes, make_program

    budgets = build.make_budgets(run)
    batches = pack_all(samples, args.rows, budgets)
    mesh = sharding.make_mesh(**run.mesh)

    def place(batch):
        return jax.tree.map(lambda x: sharding.place_rows(mesh, x), batch)

    with jax.set_mesh(mesh):
        program = make_program(run, mesh)
        params = flatten(hf.load_params(args.folder, dtype="float32"))
        params = jax.device_put(params, program.where)
        graphdef = build.abstract(run.model)[0]
        first = jax.jit(lambda p, b: OBJECTIVES["sft"](bind(graphdef, unflatten(p)), b)[0])
        loss = float(first(params, place(one_row(samples[: args.batch])[0])))
        where = jax.tree.map(lambda x: x.sharding, program.state)
        state = jax.jit(program.fresh, donate_argnums=0, out_shardings=where)(params)
        began = time.perf_counter()
        steps = [
            program.step.lower(program.state, batch_shapes(run, budget, mesh)).compile()
            for budget in budgets
        ]
        compile_seconds = time.perf_counter() - began

        def step(item):
            nonlocal state
            state, values = steps[item[0]](state, place(item[1]))
            jax.block_until_ready(values["loss"])

        seconds, _ = timed(step, batches, args)
    memory = jax.local_devices()[0].memory_stats()
    return {
        "loss": loss,
        "seconds": seconds,
        "steps": len(batches),
        "slots": [
            sum(b[1].segments.size for b in batches),
            sum(b[1].patches[0].segments.size for b in batches),
        ],
        "peak_bytes": memory["peak_bytes_in_use"] if memory else None,
        "compile_seconds": round(compile_seconds, 1),
        "peak_flops": flops.peak_flops(jax.devices()),
    }


def run_transformers(args, run, samples):
    """As `run_vlmjax`."""
    import hf_reference  # noqa: F401, prepares the import of transformers
    import torch
    from transformers import AutoModelForImageTextToText

    flash = args.device == "cuda" and importlib.util.find_spec("flash_attn")
    attention = "flash_attention_2" if flash else "sdpa"
    dtype = getattr(torch, run.model.compute.dtype)
    ids = dict(image_token_id=IMAGE, video_token_id=0)
    model = AutoModelForImageTextToText.from_pretrained(
        args.folder, attn_implementation=attention, dtype=dtype, **ids
    ).to(args.device)
    model.config.use_cache = model.config.text_config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def inputs(samples):
        batch = pad_right(samples)
        merges = [item.merge for s in samples for item in s.items]
        if merges:
            batch |= {"image_merge_sizes": torch.tensor(merges)}
            batch["pixel_values"] = batch["pixel_values"].to(dtype)
        return batch

    def loss_of(batch):
        return model(**{name: x.to(args.device) for name, x in batch.items()}).loss

    with torch.no_grad():
        loss = float(loss_of(inputs(samples[: args.batch])))
    if args.sides == "grouped":
        samples = sorted(samples, key=lambda s: -len(s.tokens))
    cuts = range(0, len(samples), args.batch)
    batches = [inputs(samples[i : i + args.batch]) for i in cuts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def step(batch):
        optimizer.zero_grad()
        loss_of(batch).backward()
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()

    seconds, _ = timed(step, batches, args)
    return {
        "loss": loss,
        "seconds": seconds,
        "steps": len(batches),
        "slots": [sum(b["input_ids"].numel() for b in batches), None],
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        "attention": attention,
    }


SIDES = {
    "model": make_model,
    "vlmjax": run_vlmjax,
    "transformers": run_transformers,
    "grouped": run_transformers,
}


def child(args):
    """Runs one side and prints what was measured."""
    run = make_run(args)
    line = {"side": args.sides} | SIDES[args.sides](args, run, make_samples(args, run.model))
    if not line.get("peak_bytes"):
        line["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(line))


def measure(args, folder, side):
    """Returns the line of a `child` in a process of its own."""
    ours = side in ("model", "vlmjax")
    env = os.environ | {"JAX_PLATFORMS": args.device if ours else "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    if ours and args.device == "cuda":
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    command = [sys.executable if ours else args.torch_python, *sys.argv]
    done = subprocess.run(
        [*command, "--sides", side, "--folder", str(folder)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def count(cfg, samples, slots):
    """Returns (FLOPs of real tokens and patches, of all `slots`, real tokens) of a pass."""
    from vlmjax.train.flops import train_flops

    stats = one_row(samples)[1]
    padded = dataclasses.replace(
        stats, tokens=slots[0], patches=(slots[1],) if slots[1] else stats.patches
    )
    real, padded = (sum(train_flops(cfg, s, MODULES).values()) for s in (stats, padded))
    return real, padded, stats.tokens


def report(line, counts, samples, peak_flops):
    """Returns the line with rates and MFU; medians over the passes."""
    real, padded, tokens = counts
    seconds = float(np.median(line["seconds"]))

    def mfu(flops):
        return round(flops / seconds / peak_flops, 4) if peak_flops else None

    return line | {
        "samples_per_second": round(samples / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "token_fill": round(tokens / line["slots"][0], 4),
        "tflops_real": round(real / seconds / 1e12, 3),
        "mfu_real": mfu(real),
        "mfu_padded": mfu(padded),
        "peak_gib": round(line["peak_bytes"] / 2**30, 3),
    }


def main():
    args = flags()
    if args.folder:
        return child(args)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    cfg = make_run(args).model
    samples = make_samples(args, cfg)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, folder, "model")
        lines = [measure(args, folder, side) for side in args.sides.split(",")]
    peak_flops = next((x["peak_flops"] for x in lines if "peak_flops" in x), None)
    lines = [report(x, count(cfg, samples, x["slots"]), len(samples), peak_flops) for x in lines]
    for line in lines:
        print(json.dumps(line), flush=True)
    tolerance = 1e-2 if cfg.compute.dtype == "bfloat16" else 1e-4
    losses = [line["loss"] for line in lines]
    if max(losses) - min(losses) > tolerance * max(losses):
        raise ValueError(f"losses at step 0 differ, so these are not the same model: {losses}")
    ours, *others = lines
    for other in others:
        ratios = {
            "against": other["side"],
            "attention": other["attention"],
            "speed_ratio": round(ours["samples_per_second"] / other["samples_per_second"], 3),
            "memory_ratio": round(other["peak_gib"] / ours["peak_gib"], 3),
        }
        print(json.dumps(ratios), flush=True)
    return None


if __name__ == "__main__":
    main()
