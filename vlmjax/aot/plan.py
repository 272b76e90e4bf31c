"""The plan of a run on a slice: compiled, replayed, counted."""

import dataclasses
import importlib.metadata
import tempfile
from pathlib import Path

from vlmjax import build, sharding
from vlmjax.aot import assume, flags, hlo, report
from vlmjax.aot.compile import compile_step
from vlmjax.aot.replay import Machine, replay
from vlmjax.aot.topology import Topology
from vlmjax.kernels.attention import blocks, pallas_tpu
from vlmjax.train import flops


def efficiencies(model, slice_):
    """Returns {"part/kernel": share of its roofline that attention reached in simulation}.

    Of several encoders, that of the one which reaches least; one without attention has none.
    """
    compute, device, chip = model.compute, slice_.devices[0], slice_.chip
    peak, result = flops.peak_flops([device]), {}
    vision = compute.vision_block, compute.vision_segment
    modules = [("vision", t, *vision) for t in model.encoders.values() if hasattr(t, "heads")]
    modules.append(("llm", model.llm, compute.llm_block, compute.llm_segment))
    for part, tower, block, segment in modules:
        sizes = tower.heads, getattr(tower, "kv_heads", tower.heads), tower.head_dim
        shape = device.device_kind, tower.head_dim, part == "llm"
        known = blocks.pair_cycles(*shape)
        block = block or blocks.best_block("pallas_tpu", *shape, segment)
        for i, name in enumerate(("forward", "backward") if block in known else ()):
            work, moved = pallas_tpu.pair_cost(*sizes, block, (2, 5)[i])
            seconds = known[block][i] * tower.heads / chip.clock
            roofline = max(work / peak, moved / chip.hbm_bandwidth)
            key, share = f"{part}/segment_attention_{name}", round(roofline / seconds, 3)
            result[key] = min(share, result.get(key, share))
    return result


def make_plan(run, name, topology, *, bucket=0, supervised=0.25, options=None, dump=None):
    """Returns the report of a run: a dict for JSON, see the keys at the end.

    Args:
      run: a `build.Run`.
      name: of the config, for the report.
      topology: name of a slice or of several, see `topology.parse`.
      bucket: index into the budgets of the run.
      supervised: share of the tokens that have a loss, assumed.
      options: {XLA option: value} over those of `flags`.
      dump: folder that keeps the compiler's text; None for a temporary one.
    """
    slice_ = Topology(topology)
    mesh = sharding.make_mesh(**run.mesh, devices=slice_.devices)
    budget = build.make_budgets(run)[bucket]
    mix = assume.mixture(run, budget, supervised)
    options = flags.options(slice_.kind) | (options or {})
    rows, chips = run.train.rows, len(slice_.devices)
    result = dict(
        config=name,
        topology=slice_.name,
        chips=chips,
        mesh=dict(mesh.shape),
        rows=rows,
        budget=dict(zip(budget.names, budget.limits, strict=True)),
        remat=run.model.compute.remat,
        assumed=dataclasses.asdict(mix),
        xla_options=options,
        versions={p: importlib.metadata.version(p) for p in ("jax", "libtpu")},
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(dump or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        compiled = compile_step(run, mesh, budget, options, folder)
        result |= report.memory_numbers(compiled, slice_)
        result["compile_seconds"] = compiled.seconds
        if compiled.refusal is None:
            machine = Machine(
                topology=slice_,
                mesh=mesh,
                peak=flops.peak_flops(slice_.devices) / chips,
                efficiency=efficiencies(run.model, slice_),
                dynamic_trips=assume.loop_trips(mix, run, budget, mesh),
            )
            module = hlo.parse(program_text(folder))
            counts = assume.stats(mix, rows, budget, run.model.form)
            work = flops.train_flops(run.model, counts, compiled.trained)
            timeline = replay(module, machine)
            result |= report.time_numbers(module, timeline, compiled, machine, work)
            tokens = rows * budget.tokens
            result["tokens_per_second_per_chip"] = tokens / result["seconds"] / chips
    return result | dict(formula=report.FORMULA, leaves_out=report.LEAVES_OUT)


def program_text(folder):
    """Returns the scheduled text of the train step from a dump."""
    return next(folder.glob("*train_step*after_codegen.txt")).read_text()
