"""`inspect`: the official sizes, in little time and memory, and the bytes of a real state."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import systems
from tiny import tiny_config

from vlmjax import build
from vlmjax.train.optimizer import make_optimizer, resolve_lr
from vlmjax.train.parameters import parameter_rows, parameter_table
from vlmjax.train.step import init_state

ROOT = Path(__file__).parents[1]
RUN = """
import re, runpy, sys, time
began = time.monotonic()
sys.argv = ["vlmjax", "inspect", "--config", {config!r}]
try:
    runpy.run_module("vlmjax.main", run_name="__main__")
finally:
    # Not ru_maxrss, which a process inherits from the one that started it.
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    print("used", time.monotonic() - began, peak / 1024)
"""


def _inspect(config):
    code = RUN.format(config=f"configs/videollama3.py:{config}")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("config", "total", "frozen"),
    [
        ("size=2b", "1,959,993,584", "1,543,714,304"),
        ("size=7b,stage=2", "8,044,744,944", "0"),
    ],
)
def test_official_sizes_within_20_seconds_and_2_gigabytes(config, total, frozen):
    text = _inspect(config)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["total"][0] == total and rows["frozen"][0] == frozen
    assert rows["vision"][0] == "412,147,440"
    blocks = re.findall(r"blocks \((\d+) layers\) +[\d,]+ +(\w+) +(\S+)", text)
    llm = ("28", "frozen", "-") if config == "size=2b" else ("28", "trained", "1e-05")
    assert blocks == [("27", "trained", "1e-05" if config == "size=2b" else "2e-06"), llm]
    seconds, mebibytes = map(float, rows["used"])
    assert seconds < 20 and mebibytes < 2000


@pytest.mark.parametrize("optim", [dict(), dict(moment_dtype="bfloat16"), dict(name="sgd", b1=0.0)])
def test_bytes_are_those_of_a_state(optim, tmp_path):
    lr = (("vision/patch/.*", 3e-4), ("(vision|llm)/.*", None), ("connector/.*", 1e-3))
    config = tiny_config(tmp_path, lr=lr, optim=optim, train__frozen_dtype="bfloat16")
    run = build.resolve(config)
    params = build.random_params(run.model, 0)
    lrs = resolve_lr(run.lr, params)
    peaks = {p: lr for p, lr in lrs.items() if lr is not None}
    optimizer = make_optimizer(run.optim, peaks, run.train.steps)
    state = init_state(params, lrs, optimizer, run.train.frozen_dtype)
    rows = parameter_rows(run)
    weights = jax.tree.leaves((state.trainable, state.frozen))
    assert sum(row.weights for row in rows) == sum(x.nbytes for x in weights)
    moments = [x for x in jax.tree.leaves(state.opt) if x.ndim]
    assert sum(row.optimizer for row in rows) == sum(x.nbytes for x in moments)
    assert sum(row.count for row in rows) == sum(x.size for x in params.values())
    assert {row.lr for row in rows if row.name == "vision/patch"} == {3e-4}
    assert all(row.optimizer == 0 for row in rows if row.lr is None)


ROWS = {
    "cambrian": """
        vision/patch vision/position vision/blocks vision/norm
        vision_2/patch vision_2/class_token vision_2/position vision_2/embed_norm vision_2/blocks
        vision_3/stem vision_3/stem_norm vision_3/stage_0 vision_3/stage_1
        connector/tower_0 connector/tower_1 connector/tower_2 connector/query connector/blocks
        connector/out connector/specials llm/embed llm/blocks llm/extra llm/norm""",
    "cogvlm2": """
        vision/patch vision/class_token vision/position vision/embed_norm vision/blocks
        connector/norm connector/conv connector/dense connector/mlp connector/specials
        llm/embed llm/blocks llm/blocks/expert llm/norm""",
}


@pytest.mark.parametrize("name", ROWS)
def test_every_part_of_a_system_has_a_row(name, tmp_path):
    config = tiny_config(tmp_path, lr=((".*", 1e-3),))
    run = dataclasses.replace(build.resolve(config), model=systems.make(name)[0])
    assert [row.name for row in parameter_rows(run)] == ROWS[name].split()
    stacked = re.findall(r"  (\S+) \((\d) layers\)", parameter_table(run))
    assert (
        stacked
        == {
            "cambrian": [
                *[("blocks", "2")] * 2,
                *[("stage_0", "1"), ("stage_1", "1")],
                *[("blocks", "2"), ("blocks", "3"), ("extra", "2")],
            ],
            "cogvlm2": [("blocks", "2")] * 2 + [("blocks/expert", "2")],
        }[name]
    )
