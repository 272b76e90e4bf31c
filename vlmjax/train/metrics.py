"""Where numbers go: a progress bar or lines, JSONL, TensorBoard on request, a loss curve."""

import json
import math
import os
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm


class Writer:
    """Writes metrics of a run; on process 0 only, silent elsewhere. Use as a context manager."""

    def __init__(self, workdir, num_steps, start, tensorboard=False):
        self.main = jax.process_index() == 0
        self.num_steps, self.start, self.began = num_steps, start, time.monotonic()
        self.bar = self.board = self.file = None
        if not self.main:
            return
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.jsonl"
        if file.exists():  # a crash may have cut a line off
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
        self.file = open(file, "a", buffering=1)  # noqa: SIM115, closed in __exit__
        if sys.stderr.isatty():
            self.bar = tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for x in (self.bar, self.board, self.file):
            if x is not None:
                x.close()

    def say(self, text):
        """Prints a line without breaking the progress bar."""
        if self.main:
            tqdm.write(text, file=sys.stderr) if self.bar is not None else print(text, flush=True)

    def write(self, step, metrics):
        """Writes {name: number} of a step (1-based: steps done)."""
        if not self.main:
            return
        metrics = {k: float(f"{v:.6g}") for k, v in metrics.items() if v is not None}
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
        shown = "  ".join(
            f"{label} {metrics[name]:{form}}"
            for name, label, form in (
                ("loss", "loss", ".4f"),
                ("held_out_loss", "held out", ".4f"),
                ("tokens_per_second", "tok/s", ",.0f"),
                ("patches_per_second", "patch/s", ",.0f"),
                ("token_fill", "fill", ".2f"),
                ("patch_fill", "patch fill", ".2f"),
                ("mfu", "mfu", ".3f"),
            )
            if name in metrics
        )
        if self.bar is not None:
            self.bar.set_postfix_str(shown)
            self.bar.update(step - self.bar.n)
            return
        left = (time.monotonic() - self.began) / max(step - self.start, 1) * (self.num_steps - step)
        print(f"step {step}/{self.num_steps}  {shown}  left {left:.0f}s", flush=True)


def read(workdir):
    """Returns the list of metric dicts of a run; the last of a step logged twice (by a resume)."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return list({m["step"]: m for m in map(json.loads, lines)}.values())


def plot_curve(workdir, title):
    """Writes loss.png: losses, in training and held out, and the fill of both buffers, by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read(workdir)
    steps = [m["step"] for m in rows]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1))
    top.plot(steps, [m.get("loss", math.nan) for m in rows], label="training")
    if measured := [(m["step"], m["held_out_loss"]) for m in rows if "held_out_loss" in m]:
        top.plot(*zip(*measured, strict=True), "o-", markersize=3, label="held out")
        top.legend(loc="upper right")
    top.set(ylabel="loss", title=title)
    top.grid(alpha=0.3)
    for name, label in (("token_fill", "tokens"), ("patch_fill", "patches")):
        bottom.plot(steps, [m.get(name, math.nan) for m in rows], label=label)
    bottom.set(xlabel="step", ylabel="fill", ylim=(0, 1.02))
    bottom.legend(loc="lower right")
    bottom.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(Path(workdir) / "loss.png", dpi=110)
    plt.close(figure)
