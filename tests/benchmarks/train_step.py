"""One training step against transformers + torch: the same tiny VideoLLaMA3, samples and machine.

python tests/benchmarks/train_step.py [--rounds 2] [--cases equal,mixture] [--width 256 ...]

Two kinds of samples, one image (or none) and a question with an answer each: images of one size,
and a native-resolution mixture (areas and text lengths log-uniform, every eighth sample text only).
transformers trains as its users do: batches in the order of the list, right-padded, `pixel_values`
rows concatenated, sdpa, fused AdamW, two threads; for the mixture also with batches of samples of
like length. We train packed rows, one on each of two CPU devices. Both in f32, with an optimizer
step for about as many samples, all parameters trained, and the loss of answers only. Each side runs
in its own process, so that peak memory is its own; sides alternate, in an order that changes from
round to round. Losses before the first step must agree to 1e-4. Both sides get huge pages from
glibc (`GLIBC_TUNABLES`): fresh memory costs them page faults otherwise, us more than torch.

Prints JSON lines: one for each process, then one of ratios for each case (above 1 = we are faster,
or smaller). `speed_ratio` compares medians, `best_ratio` the fastest pass of each side: where they
differ the machine was busy (two threads of torch that lose a core wait for each other).
"""

import argparse
import dataclasses
import functools
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
IMAGE = 1  # the token that stands for a visual token
LR = 1e-4


def flags():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side and case")
    parser.add_argument(
        "--repeats", type=int, default=3, help="passes over the samples in a process"
    )
    parser.add_argument("--cases", default="equal,mixture")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step")
    parser.add_argument("--vocab", type=int, default=800)
    parser.add_argument("--width", type=int, default=256, help="of the decoder; heads of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the tower and of the decoder")
    parser.add_argument("--vision-heads", type=int, default=4, help="of 72, as in SigLIP so400m")
    parser.add_argument("--vision-block", type=int, default=256)
    parser.add_argument("--llm-block", type=int, default=160)
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--loss-chunk", type=int, default=256)
    parser.add_argument("--attention", default="blockwise")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_samples(case, number, vocab):
    """Returns `Sample`s: 16x16 patches and 64 tokens of text, or sizes over two decades."""
    from vlmjax.data.sample import Item, Sample

    rng = np.random.default_rng(0)
    samples = []
    for i in range(number):
        grid, text = (16, 16), 64
        if case == "mixture":
            area, aspect = 2 ** rng.uniform(2, 10), 2 ** rng.uniform(-1, 1)
            grid = tuple(max(1, round(area**0.5 * a)) for a in (aspect**0.5, aspect**-0.5))
            text = round(2 ** rng.uniform(3, 9))
        num = 0 if case == "mixture" and i % 8 == 7 else grid[0] * grid[1]
        words = rng.integers(2, vocab, text).astype(np.int32)
        cut = text // 3
        tokens = np.concatenate([words[:4], np.full(num, IMAGE, np.int32), words[4:]])
        labels = np.where(np.arange(len(tokens)) >= num + cut, tokens, -100).astype(np.int32)
        pixels = rng.integers(0, 256, (num, 588), dtype=np.uint8)
        items = (Item(pixels, grid, 1, np.ones(num, bool)),) if num else ()
        samples.append(Sample(f"{i}", tokens, labels, items, tokens == IMAGE))
    return samples


def make_model(args, folder):
    """Saves a random VideoLlama3 of transformers."""
    import hf_reference
    import torch
    from transformers import AutoModelForImageTextToText, VideoLlama3Config

    heads = args.width // 64
    vision_width = 72 * args.vision_heads
    text = hf_reference._text("qwen2", args.width, heads, max(heads // 2, 1), True)
    text |= dict(
        vocab_size=args.vocab, intermediate_size=3 * args.width, num_hidden_layers=args.layers
    )
    vision = dict(
        hidden_size=vision_width,
        intermediate_size=3 * vision_width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.vision_heads,
        patch_size=14,
    )
    torch.manual_seed(0)
    config = VideoLlama3Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=0
    )
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def timed(step, batches, args):
    """Returns (seconds, CPU seconds) of each pass; `step` returns when its work is done."""
    for batch in batches[:2]:
        step(batch)
    seconds, cpu = [], []
    for _ in range(args.repeats):
        began, used = time.perf_counter(), time.process_time()
        for batch in batches:
            step(batch)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    return seconds, cpu


def pack_rows(samples, rows, share, blocks):
    """Returns packed `Batch`es; a row holds `share` mean samples, at least the largest one."""
    from vlmjax.batch import Budget, Form, TowerForm
    from vlmjax.data.pack import first_fit, pack, size

    sizes = np.array([size(s) for s in samples])
    tokens, patches, *_ = np.maximum(sizes.max(0), np.ceil(sizes.mean(0) * share)).astype(int)
    tokens, patches = (
        -(-n // block) * block for n, block in zip((tokens, patches), blocks, strict=True)
    )
    budget = Budget(int(tokens), int(patches), int(patches), 1)
    waiting = sorted(samples, key=lambda s: -max(np.divide(size(s), np.maximum(budget.limits, 1))))
    batches = []
    while waiting:
        places = first_fit([size(s) for s in waiting], rows, budget)
        chosen = [
            [s for s, p in zip(waiting, places, strict=True) if p == row] for row in range(rows)
        ]
        batches.append(pack(chosen, budget, Form((TowerForm(14),)))[0])
        waiting = [s for s, p in zip(waiting, places, strict=True) if p is None]
    return batches


def run_vlmjax(args, samples):
    """Returns what was measured; without repeats, the loss of one step's samples at the start."""
    import jax

    from vlmjax import build, hf, sharding
    from vlmjax.nn import bind, flatten, unflatten
    from vlmjax.objectives import OBJECTIVES
    from vlmjax.train.optimizer import OptimConfig, make_optimizer
    from vlmjax.train.step import init_state, make_train_step
    from vlmjax.vlm import Compute

    blocks = args.llm_block, args.vision_block
    compute = Compute(
        attention=args.attention,
        remat=args.remat,
        vision_block=args.vision_block,
        llm_block=args.llm_block,
        loss_chunk=args.loss_chunk,
    )
    cfg = dataclasses.replace(hf.read_config(args.folder), compute=compute)
    rows = jax.device_count()
    mesh = sharding.make_mesh(data=-1)
    with jax.set_mesh(mesh):
        graphdef, shapes, axes = build.abstract(cfg)
        where = build.shardings(shapes, axes, mesh)
        params = jax.device_put(flatten(hf.load_params(args.folder)), where)
        place = functools.partial(sharding.place_rows, mesh)
        if not args.repeats:
            (batch,) = pack_rows(samples[: args.batch], args.batch, 1, blocks)
            loss = jax.jit(lambda p, b: OBJECTIVES["sft"](bind(graphdef, unflatten(p)), b)[0])
            return {"loss": float(loss(params, jax.tree.map(place, batch)))}
        batches = pack_rows(samples, rows, args.batch / rows, blocks)
        lrs = dict.fromkeys(params, LR)
        optimizer = make_optimizer(OptimConfig(schedule="constant", warmup=0.0), lrs, 1)
        state = jax.jit(lambda p: init_state(p, lrs, optimizer, "float32"), donate_argnums=0)(
            params
        )
        shard = jax.tree.map(lambda x: x.sharding, state)
        fn = make_train_step(graphdef, OBJECTIVES["sft"], optimizer)
        train_step = jax.jit(fn, donate_argnums=0, out_shardings=(shard, None))

        def step(batch):
            nonlocal state
            state, values = train_step(state, jax.tree.map(place, batch))
            jax.block_until_ready(values["loss"])

        seconds, cpu = timed(step, batches, args)
    fill = np.mean([(b.segments > 0).mean() for b in batches])
    return {"seconds": seconds, "cpu": cpu, "steps": len(batches), "fill": round(float(fill), 3)}


def pad_right(samples):
    """Returns the inputs of transformers for a batch, padded to its longest sample."""
    import torch

    length = max(len(s.tokens) for s in samples)

    def padded(rows, value):
        return torch.tensor(
            np.stack([np.pad(x, (0, length - len(x)), constant_values=value) for x in rows])
        ).long()

    inputs = {
        "input_ids": padded([s.tokens for s in samples], 2),
        "attention_mask": padded([np.ones(len(s.tokens), int) for s in samples], 0),
        "labels": padded([s.labels for s in samples], -100),
    }
    items = [item for s in samples for item in s.items]
    if items:
        pixels = np.concatenate([i.patches for i in items]).astype(np.float32) / 127.5 - 1
        inputs["pixel_values"] = torch.tensor(pixels)
        inputs["image_grid_thw"] = torch.tensor([[1, *i.grid] for i in items])
        inputs["image_merge_sizes"] = torch.ones(len(items), dtype=torch.long)
    return inputs


def run_transformers(args, samples, group=False):
    """As `run_vlmjax`; `group` makes batches of samples of like length."""
    import hf_reference  # noqa: F401, prepares the import of transformers
    import torch
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(2)
    model = AutoModelForImageTextToText.from_pretrained(
        args.folder, attn_implementation="sdpa", dtype=torch.float32
    )
    model.train()
    model.config.use_cache = model.config.text_config.use_cache = False
    samples = sorted(samples, key=lambda s: -len(s.tokens)) if group else samples
    batches = [pad_right(samples[i : i + args.batch]) for i in range(0, len(samples), args.batch)]
    if not args.repeats:
        with torch.no_grad():
            return {"loss": float(model(**batches[0]).loss)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def step(batch):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        loss.item()

    seconds, cpu = timed(step, batches, args)
    fill = np.mean([float(b["attention_mask"].float().mean()) for b in batches])
    return {"seconds": seconds, "cpu": cpu, "steps": len(batches), "fill": round(float(fill), 3)}


SIDES = {
    "vlmjax": run_vlmjax,
    "transformers": run_transformers,
    "transformers_grouped": functools.partial(run_transformers, group=True),
}


def child(args):
    """Runs one side of one case and prints what was measured."""
    samples = pickle.loads((args.folder / f"{args.cases}.pickle").read_bytes())
    line = {"case": args.cases, "side": args.side} | SIDES[args.side](args, samples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(line | {"peak_mib": round(peak)}))


def measure(args, folder, case, side, repeats):
    """Returns the line of a `child` in a process of its own."""
    changes = ["--side", side, "--folder", str(folder), "--cases", case, "--repeats", str(repeats)]
    env = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "OMP_NUM_THREADS": "2"}
    env["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *sys.argv, *changes],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(args, folder, case):
    """Prints the lines of a case and its ratios."""
    sides = list(SIDES)[: 2 if case == "equal" else 3]
    loss = {side: measure(args, folder, case, side, 0)["loss"] for side in sides[:2]}
    ours, theirs = loss.values()
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise ValueError(f"losses at step 0 differ, so these are not the same model: {loss}")
    lines = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides[:: -1 if number % 2 else 1]:
            line = measure(args, folder, case, side, args.repeats)
            line["load"] = [round(x, 2) for x in os.getloadavg()]
            print(json.dumps(line), flush=True)
            lines[side].append(line)

    def median(side, key):
        return float(np.median([line[key] for line in lines[side]]))

    def best(side):
        return min(x for line in lines[side] for x in line["seconds"])

    for other in sides[1:]:
        ratios = {
            "case": case,
            "against": other,
            "loss": loss,
            "samples_per_second": [
                round(args.samples / median(s, "seconds"), 2) for s in ("vlmjax", other)
            ],
            "speed_ratio": round(median(other, "seconds") / median("vlmjax", "seconds"), 3),
            "best_ratio": round(best(other) / best("vlmjax"), 3),
            "cpu_ratio": round(median(other, "cpu") / median("vlmjax", "cpu"), 3),
            "peak_mib": [median(s, "peak_mib") for s in ("vlmjax", other)],
            "memory_ratio": round(median(other, "peak_mib") / median("vlmjax", "peak_mib"), 3),
        }
        print(json.dumps(ratios), flush=True)


def main():
    args = flags()
    if args.side:
        return child(args)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(
            json.dumps({"parameters": make_model(args, folder), "load": os.getloadavg()}),
            flush=True,
        )
        for case in args.cases.split(","):
            (folder / f"{case}.pickle").write_bytes(
                pickle.dumps(make_samples(case, args.samples, args.vocab))
            )
            compare(args, folder, case)
    return None


if __name__ == "__main__":
    main()
