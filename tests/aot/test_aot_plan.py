"""Plans of a tiny run: what they hold, what does not fit, what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config

from vlmjax import build
from vlmjax.aot import cli, flags, report, sweep
from vlmjax.aot.compile import out_of_memory
from vlmjax.aot.plan import make_plan
from vlmjax.aot.topology import Topology

KEYS = {
    "fits",
    "hbm_bytes",
    "argument_bytes",
    "temporary_bytes",
    "op_seconds",
    "kernel_seconds",
    "exposed_communication_seconds",
    "flops",
    "mfu_estimate",
    "collectives",
    "compile_seconds",
}
MESH = dict(data=2, fsdp=2, seq=1, tensor=1)
LLM = dict(vocab=272, width=128, mlp=256, layers=2, heads=4, kv_heads=2, head_dim=64)
SIZES = dict(  # heads and rows that the TPU kernels take
    model__vision=dict(width=128, mlp=256, layers=2, heads=2, patch=8),
    model__llm=LLM,
    model__compute=dict(dtype="bfloat16", loss_chunk=128, vision_segment=64, llm_segment=128),
    data__budget=(256, 256, 256, 4),
    train__rows=4,
    mesh=MESH,
)


@pytest.mark.slow
def test_plan_of_the_real_step(tmp_path):
    run = build.resolve(tiny_config(tmp_path, **SIZES))
    plan = make_plan(run, "tiny", "v5e:2x2", dump=tmp_path / "dump")
    assert set(plan) >= KEYS and json.loads(json.dumps(plan))["fits"] is True
    assert plan["margin_bytes"] == plan["hbm_bytes"] - plan["peak_bytes"] > 0
    # The compiler pads small arrays, so what it counts is more.
    assert 0 < sum(plan["arguments"].values()) <= plan["argument_bytes"]
    axes = {tuple(row["axes"]) for row in plan["collectives"]}
    assert ("fsdp",) in axes and ("data",) in axes and () not in axes
    kernels = {(k["name"], k["part"]) for k in plan["kernels"] if k["estimated"]}
    assert {("segment_attention_forward", part) for part in ("vision", "llm")} <= kernels
    assert 0 < plan["mfu_estimate"] < 1 and plan["kernel_seconds"] > 0
    assert [loop["part"] for loop in plan["uncounted_loops"]] == ["loss", "loss"]
    assert {op["part"] for op in plan["ops"]} >= {"vision", "connector", "llm", "loss"}
    assert plan["seconds"] == pytest.approx(
        plan["op_seconds"] + plan["kernel_seconds"] + plan["exposed_communication_seconds"]
    )
    assert sum(op["seconds"] for op in plan["ops"]) == pytest.approx(plan["op_seconds"])
    text = report.text(plan)
    assert "FITS" in text and "estimated MFU" in text and "all-gather over ['fsdp']" in text
    assert list((tmp_path / "dump").glob("*train_step*after_codegen.txt"))


@pytest.mark.slow
def test_what_does_not_fit_exits_with_3(tmp_path, capsys):
    """A token table of 16 GiB a chip; XLA itself refuses it."""
    config = tiny_config(tmp_path, **SIZES | dict(model__llm=LLM | dict(vocab=2**26)))
    given = {name: default for _, name, default, _ in cli.FLAGS}
    given |= dict(topology="v5e:2x2", json=str(tmp_path / "plan.json"))
    assert cli.run(config, "tiny", [], given) == 3
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] is False and plan["margin_bytes"] < 0 and "seconds" not in plan
    assert (
        f"DOES NOT FIT, {-plan['margin_bytes'] / 2**30:.2f} GiB too much" in capsys.readouterr().out
    )
    assert (tmp_path / "plan.png").stat().st_size > 5000


@pytest.mark.slow
def test_command(tmp_path):
    """As a user starts it: the exit code, the picture, and nothing but the report is said."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vlmjax.main", "aot", "--config=configs/demo.py:stage=2"),
            *("--topology=v5e-4", f"--json={tmp_path}/a/plan.json"),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("configs/demo.py:stage=2 on v5e:2x2: 4 chips")
    assert done.stderr == ""
    assert (tmp_path / "a" / "plan.png").stat().st_size > 5000


def test_rows_must_divide(tmp_path):
    run = build.resolve(tiny_config(tmp_path, train__rows=6, mesh=MESH))
    with pytest.raises(ValueError, match=r"train\.rows=6 .*does not divide over data x fsdp = 4"):
        make_plan(run, "tiny", "v5e:2x2")


def test_refusals_of_the_compiler():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (20.50G) exceeds available HBM (15.75G)."
    )
    assert out_of_memory(message) == int(20.5 * 2**30)
    assert out_of_memory("RESOURCE_EXHAUSTED: scoped vmem") is None


def test_flags_have_reasons():
    for kind, rows in flags.FLAGS.items():
        assert all(len(reason) > 20 for _, _, reason in rows)
        assert flags.options(kind)["xla_jf_spmd_threshold_for_windowed_einsum_mib"]
    assert flags.parse("--a=1,b=x") == {"a": "1", "b": "x"}
    with pytest.raises(ValueError, match=r"\['c'\] have no value; give name=value"):
        flags.parse("a=1,c")


def test_candidates_of_a_sweep(tmp_path):
    run = build.resolve(tiny_config(tmp_path, train__rows=4, mesh=MESH))
    chips = Topology("v5e:4x4").devices
    any_mesh = dataclasses.replace(run, mesh=dict(data=-1))
    rows = sweep.candidates(any_mesh, chips, ["mesh", "rows"])
    assert {row["remat"] for row in rows} == {"none"}
    assert dict(data=1, fsdp=16, seq=1, tensor=1) in [row["mesh"] for row in rows]
    for row in rows:
        sizes = row["mesh"]
        assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == 16
        assert row["rows"] % (sizes["data"] * sizes["fsdp"]) == 0
    assert sweep.candidates(run, chips[:4], ["remat"])[0] == dict(mesh=MESH, remat="full", rows=4)
    with pytest.raises(ValueError, match=r"\['rowz'\] is unknown; choose among mesh, remat, rows"):
        sweep.candidates(run, chips, ["rowz"])


def test_a_sweep_tries_nothing_hopeless(tmp_path, monkeypatch):
    """More rows, or keeping more, than what did not fit with full remat; failures are rows too."""
    run = build.resolve(tiny_config(tmp_path, train__rows=4, mesh=MESH))

    def one(candidate, argv):
        result = sweep.failed("failed with exit code 1: boom")
        if candidate["remat"] == "dots":
            return result
        fits = candidate["rows"] == 4
        plan = dict(seconds=1.0, mfu_estimate=0.5, tokens_per_second_per_chip=9, peak_bytes=2**30)
        return result | dict(fits=fits, does_not_fit=not fits, reason="") | (plan if fits else {})

    monkeypatch.setattr(sweep, "one", one)
    said = []
    rows = sweep.run(run, [], "v5e:2x2", ["remat", "rows"], said.append)
    assert len(rows) == len(said) and rows[0]["fits"]
    reasons = {(row["rows"], row["remat"]): row["reason"] for row in rows}
    assert "boom" in reasons[4, "dots"] and not reasons[8, "full"]
    assert all(
        reasons[16, x].startswith("not tried: 8 rows with remat full") for x in ("full", "none")
    )
    assert "MFU 0.500" in sweep.table(rows)
