"""A picture of where the time and the memory of a planned step go."""

from collections import Counter

from matplotlib import colormaps
from matplotlib.figure import Figure

from vlmjax.aot.replay import part_of
from vlmjax.aot.report import mfu_text

GiB = 2**30
KINDS = ("matmul", "kernel", "elementwise", "copy and layout", "other", "exposed communication")
COLOURS = dict(
    zip(KINDS, ("#2b6cb0", "#6b46c1", "#dd9b3c", "#b7a99a", "#cbd5e0", "#c53030"), strict=True)
)
LAYOUT = ("copy", "wait for memory", "broadcast", "reshape", "transpose", "convert", "pad", "slice")


def time_bars(r):
    """Returns {(part, direction): Counter of seconds by kind of `KINDS`} of a report."""
    bars = {}

    def add(part, direction, kind, seconds):
        key = part, direction if part != "optimizer" else "update"
        bars.setdefault(key, Counter())[kind] += seconds

    for op in r["ops"]:
        kind = {"matmul": "matmul", "fusion": "elementwise"}.get(op["kind"], "other")
        kind = "copy and layout" if op["kind"] in LAYOUT else kind
        add(op["part"], op["direction"], kind, op["seconds"])
    for k in r["kernels"]:
        add(k["part"], k["direction"], "kernel", k["seconds"])
    for c in r["collectives"]:
        add(c["part"], c["direction"], "exposed communication", c["exposed_seconds"])
    return bars


def memory_bars(r):
    """Returns [(name, bytes)] that add up to the peak of a chip."""
    bars = [(f"{name}", size) for name, size in r["arguments"].items()]
    left = r["temporary_bytes"]
    for name, size in r["peak_buffers"][:5]:
        size = min(size, left)
        bars.append((short(name), size))
        left -= size
    bars.append(("other temporaries", left))
    rest = r["peak_bytes"] - sum(size for _, size in bars)
    return [(name, size) for name, size in [*bars, ("program and outputs", rest)] if size > 0]


def short(name):
    """Returns "vision broadcast_in_dim" of a path of named scopes."""
    part, last = part_of(name, ""), name.rsplit("/", 1)[-1]
    return f"{part} {last}".strip()


def draw(r, file):
    """Writes the picture of a report to a PNG file."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if "seconds" in r:
        draw_time(left, r)
    else:
        left.set_axis_off()
        left.text(0.5, 0.5, "no schedule: the program does not fit", ha="center")
    draw_memory(right, r)
    mesh = " ".join(f"{k} {v}" for k, v in r["mesh"].items() if v > 1)
    figure.suptitle(
        f"{r['config']}  on  {r['topology']}  ({mesh}), {r['rows']} rows, remat {r['remat']}: "
        "compiler estimates"
    )
    figure.savefig(file, dpi=110)


def draw_time(axis, r):
    bars = time_bars(r)
    total = {key: sum(kinds.values()) for key, kinds in bars.items()}
    order = sorted(total, key=lambda key: -sum(s for k, s in total.items() if k[0] == key[0]))
    order = [key for key in order if total[key] > 0.002 * r["seconds"]]
    for y, key in enumerate(order):
        x = 0.0
        for kind in KINDS:
            width = bars[key][kind]
            axis.barh(y, width, left=x, color=COLOURS[kind], label=kind if y == 0 else None)
            x += width
        axis.text(x, y, f" {x / r['seconds']:.1%}", va="center", fontsize=8)
    axis.set_yticks(range(len(order)), [" ".join(key) for key in order])
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a step")
    axis.set_title(f"{r['seconds']:.3f} s, estimated MFU {mfu_text(r)}")
    axis.legend(loc="lower right", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def draw_memory(axis, r):
    bars = memory_bars(r)
    colours = colormaps["tab20"].colors
    base = 0.0
    for (name, size), colour in zip(bars, colours, strict=False):
        label = f"{name}  {size / GiB:.2f}"
        axis.bar(0, size / GiB, bottom=base, color=colour, width=0.5, label=label)
        base += size / GiB
    capacity = r["hbm_bytes"] / GiB
    axis.axhline(capacity, color="#c53030", linestyle="--")
    axis.text(0, capacity, f"{capacity:.2f} GiB of HBM", va="bottom", ha="center")
    axis.set_xlim(-0.5, 2.2)
    axis.set_ylim(0, 1.1 * max(base, capacity))
    axis.set_xticks([])
    axis.set_ylabel("GiB of a chip")
    axis.set_title("fits" if r["fits"] else "does not fit")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="center right", fontsize=8, frameon=False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
