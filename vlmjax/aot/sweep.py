"""Plans of many variants of a run, each compiled in a process of its own."""

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vlmjax import sharding
from vlmjax.aot.topology import Topology
from vlmjax.nn import REMAT

GiB = 2**30
ROWS = (1, 2, 4)  # of a shard of rows


def meshes(devices, own):
    """Returns the meshes to try: the run's own, FSDP over a slice, copies of it, with tensor."""
    found, slices = [own], sharding.num_slices(devices)
    for tensor, copies in itertools.product((1, 2, 4), (1, 4, 16)):
        data = copies * slices
        if len(devices) % (tensor * data) == 0:
            sizes = dict(data=data, fsdp=len(devices) // tensor // data, seq=1, tensor=tensor)
            found += [sizes] if sizes != own else []
    return found


def candidates(run, devices, over):
    """Returns a list of {"mesh", "remat", "rows"}, those that need least memory first.

    Args:
      run: a `build.Run`, of which the rest is kept.
      devices: of the slice.
      over: what to vary, of "mesh", "remat", "rows".
    """
    unknown = set(over) - {"mesh", "remat", "rows"}
    if unknown:
        raise ValueError(
            f"--sweep_over={sorted(unknown)} is unknown; choose among mesh, remat, rows"
        )
    compute = run.model.compute
    remats = sorted(REMAT, key=lambda name: name != "full") if "remat" in over else [compute.remat]
    result = []
    own = dict(sharding.make_mesh(**run.mesh, devices=devices).shape)
    for mesh in meshes(devices, own) if "mesh" in over else [own]:
        shards = len(devices) // (mesh["seq"] * mesh["tensor"]) * run.train.accumulate
        rows = [n * shards for n in ROWS] if "rows" in over else [run.train.rows]
        result += [dict(mesh=mesh, remat=x, rows=n) for n, x in itertools.product(rows, remats)]
    return result


def hopeless(candidate, done):
    """Returns why a candidate cannot fit, from those that did not, or None."""
    for row in done:
        same = row["mesh"] == candidate["mesh"] and row["remat"] in ("full", candidate["remat"])
        if same and row["does_not_fit"] and row["rows"] <= candidate["rows"]:
            return f"not tried: {row['rows']} rows with remat {row['remat']} do not fit"
    return None


def run(resolved, argv, topology, over, say=print):
    """Returns the rows of the table: {"mesh", "remat", "rows", "fits", "reason", ...}, best first.

    Args:
      resolved: the `build.Run`.
      argv: the command line to repeat.
      topology: name of the slice.
      over: see `candidates`.
      say: function that shows a line of progress.
    """
    todo = candidates(resolved, Topology(topology).devices, over)
    done, began = [], time.monotonic()
    for i, candidate in enumerate(todo, 1):
        reason = hopeless(candidate, done)
        row = candidate | (one(candidate, argv) if reason is None else failed(reason))
        done.append(row)
        say(f"[{i}/{len(todo)}, {time.monotonic() - began:.0f} s] {line(row)}")
    return sorted(done, key=lambda row: -(row["tokens_per_second_per_chip"] or 0))


def failed(reason):
    """Returns what the row of a candidate without a plan holds."""
    return dict(
        fits=False,
        does_not_fit=False,
        reason=reason,
        peak_bytes=None,
        seconds=None,
        mfu_estimate=None,
        tokens_per_second_per_chip=None,
    )


def one(candidate, argv):
    """Returns the results of a candidate, planned by another process."""
    changes = {
        **{f"mesh.{axis}": size for axis, size in candidate["mesh"].items()},
        "model.compute.remat": candidate["remat"],
        "train.rows": candidate["rows"],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "vlmjax.main", *argv[1:], "--nosweep", f"--json={file}"]
        command += [f"--config.{key}={value}" for key, value in changes.items()]
        process = subprocess.run(command, capture_output=True, text=True)
        if not file.exists():
            said = process.stderr.strip().splitlines() or ["no message"]
            errors = [x for x in said if re.match(r"[\w.]+(Error|Exhausted): ", x)] or said
            return failed(f"failed with exit code {process.returncode}: {errors[-1]}")
        plan = json.loads(file.read_text())
    over = -plan["margin_bytes"] / GiB
    result = failed("" if plan["fits"] else f"does not fit by {over:.2f} GiB")
    result |= {key: plan[key] for key in result if key in plan}
    return result | dict(does_not_fit=not plan["fits"])


def line(row):
    """Returns a row as text."""
    mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size != 1)
    text = f"{mesh or 'one chip':24s} remat {row['remat']:10s} rows {row['rows']:5d}  "
    if row["peak_bytes"] is not None:
        text += f"{row['peak_bytes'] / GiB:7.2f} GiB  "
    if row["fits"]:
        mfu = row["mfu_estimate"]
        text += f"{row['seconds']:8.3f} s  MFU {'unknown' if mfu is None else f'{mfu:.3f}'}  "
        text += f"{row['tokens_per_second_per_chip']:10,.0f} tokens/s/chip"
    return text + row["reason"]


def table(rows):
    """Returns the rows as text, best first."""
    return "\n".join(["", "best first (compiler estimates)", *map(line, rows)])
