"""The `aot` command: what a train step will need and take on a TPU slice that is not there.

python -m vlmjax.main aot --config configs/videollama3.py:stage=2 --topology v5e:4x4 --json a.json
"""

import json
from pathlib import Path

# (kind of absl flag, name, default, help) of what `run` takes.
FLAGS = (
    ("string", "topology", None, "slice, e.g. v5e:4x4 or v5p-64, or several: 2xv5p-64"),
    ("string", "json", None, "file for the numbers; a picture goes beside it, .png"),
    ("string", "dump", None, "folder that keeps the compiler's own text"),
    ("integer", "bucket", 0, "which budget: 0 is data.budget, then data.buckets"),
    ("float", "supervised", 0.25, "share of the tokens that have a loss, assumed"),
    ("string", "xla", "", "name=value,... over the XLA options of vlmjax.aot.flags"),
    ("bool", "sweep", False, "try meshes, remat policies and rows of a chip"),
    ("list", "sweep_over", ["mesh", "remat", "rows"], "which of them"),
)
DOES_NOT_FIT = 3  # exit code


def run(config, name, argv, given):
    """Prints the plan of a config, or of its variants; returns the exit code.

    Args:
      config: the ConfigDict.
      name: of the config file with its argument.
      argv: the command line, which a sweep repeats with changes.
      given: {name: value} of `FLAGS`.
    """
    import jax

    if jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")
    from vlmjax import build
    from vlmjax.aot import flags, picture, plan, report, sweep

    resolved = build.resolve(config)
    if given["sweep"]:
        rows = sweep.run(resolved, argv, given["topology"], given["sweep_over"])
        print(sweep.table(rows))
        write(rows, given["json"])
        return 0 if any(row["fits"] for row in rows) else DOES_NOT_FIT
    result = plan.make_plan(
        resolved,
        name,
        given["topology"],
        bucket=given["bucket"],
        supervised=given["supervised"],
        options=flags.parse(given["xla"]),
        dump=given["dump"],
    )
    print(report.text(result))
    write(result, given["json"])
    if given["json"]:
        picture.draw(result, Path(given["json"]).with_suffix(".png"))
    return 0 if result["fits"] else DOES_NOT_FIT


def write(result, file):
    """Writes a result as JSON, if there is a file."""
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(result, indent=1))
