"""From what the compiler said to the numbers of a plan, and to text."""

import re
from collections import Counter

from vlmjax import sharding
from vlmjax.aot import schedule
from vlmjax.aot.replay import kind_of, part_of

GiB = 2**30
FORMULA = (
    "seconds = op_seconds + kernel_seconds + exposed_communication_seconds; "
    "mfu_estimate = flops / (chips x peak x seconds). Operations take the cycles XLA estimates, "
    "Pallas kernels the roofline time of their CostEstimate over the efficiency a simulation "
    "reached, collectives their bytes over the ICI links, or between slices over the share of the "
    "network that the data sheet gives a chip; loops count their trips."
)
LEAVES_OUT = (
    "the host and its data, the transfer of batches, padding in rows, stragglers, latency, other "
    "traffic and the work of the hosts between slices, the error of XLA's estimates (0.3 % on "
    "matmuls; 2.5-4x too long on fusions of differences and sums), HBM contention between "
    "overlapped transfers"
)


def memory_numbers(compiled, topology):
    """Returns the memory part of a report."""
    m, capacity = compiled.memory, topology.chip.hbm_bytes
    arguments = sum(compiled.arguments.values())
    numbers = dict(
        fits=compiled.refusal is None and compiled.peak_bytes <= capacity,
        hbm_bytes=capacity,
        peak_bytes=compiled.peak_bytes,
        margin_bytes=capacity - compiled.peak_bytes,
        argument_bytes=m.argument_size_in_bytes if m else arguments,
        arguments=compiled.arguments,
        temporary_bytes=m.temp_size_in_bytes if m else compiled.peak_bytes - arguments,
        code_bytes=m.generated_code_size_in_bytes if m else None,
        refusal=compiled.refusal,
    )
    live = next(compiled.dump.glob("*train_step*live-range.txt"), None)
    return numbers | dict(peak_buffers=peak_buffers(live.read_text()) if live else [])


def peak_buffers(text, most=12):
    """Returns [(name, bytes)] of the largest temporaries alive when most memory is.

    Args:
      text: of `*live-range.txt`, which ends with a tree of the buffers alive at the peak.
      most: buffers to return.
    """
    tree = text[text.rfind("breakdown for peak usage") :]
    sizes = Counter()
    for name, size in re.findall(r"── (\S.*?) \([\d.]+%, total: .*?current: ([\d ]+) bytes", tree):
        if int(size.replace(" ", "")) and not re.match(r"(state|batch)\b", name):
            sizes[re.sub(r"\{\d+\}$", "", name)] += int(size.replace(" ", ""))
    return sizes.most_common(most)


def time_numbers(module, timeline, compiled, machine, work):
    """Returns the time part of a report.

    Args:
      module: `hlo.Module`.
      timeline: its `replay.Timeline`.
      compiled: `compile.Compiled`.
      machine: `replay.Machine`.
      work: {part: true FLOPs of a step on all chips}.
    """
    chips, chip = machine.mesh.devices.size, machine.topology.chip
    seconds = timeline.op_seconds + timeline.kernel_seconds + timeline.exposed_seconds
    unknown = [loop for loop in timeline.uncounted if not loop["trips_assumed"]]
    dump = next(compiled.dump.glob("*train_step*.schedule.txt"), None)
    if dump:
        with dump.open() as lines:
            scheduler = schedule.exposed_seconds(lines, timeline.trips)
    m = compiled.memory
    touched = m.argument_size_in_bytes + m.output_size_in_bytes + 2 * m.temp_size_in_bytes
    return dict(
        seconds=seconds,
        op_seconds=timeline.op_seconds,
        kernel_seconds=timeline.kernel_seconds,
        exposed_communication_seconds=timeline.exposed_seconds,
        scheduler_exposed_seconds=scheduler if dump else None,
        seconds_without_estimate=timeline.assumed,
        flops=sum(work.values()),
        flops_by_part=work,
        peak_flops=machine.peak,
        # Work that is not counted would be done in no time.
        mfu_estimate=None if unknown else sum(work.values()) / (chips * machine.peak * seconds),
        roofline=dict(
            matmul_seconds=sum(work.values()) / chips / machine.peak,
            hbm_seconds=touched / chip.hbm_bandwidth,
        ),
        ops=[
            dict(kind=kind, part=part, direction=direction, seconds=s)
            for (kind, part, direction), s in timeline.ops.most_common()
        ],
        dearest=dearest(module, timeline, chip.clock),
        kernels=list(timeline.kernels.values()),
        collectives=sorted(timeline.collectives, key=lambda c: -c["bytes"]),
        collective_bytes=sum(c["bytes"] for c in timeline.collectives),
        between_slices=between_slices(timeline.collectives, machine.topology),
        uncounted_loops=timeline.uncounted,
    )


def between_slices(collectives, topology):
    """Returns what a chip sends over the network between slices in a step; None with one slice."""
    if topology.slices == 1:
        return None
    rows = [c for c in collectives if c["part"] == "network"]
    return dict(
        slices=topology.slices,
        axis=sharding.ACROSS,
        kinds=sorted({c["kind"] for c in rows}),
        count=sum(c["count"] for c in rows),
        sent_bytes=sum(c["sent_bytes"] for c in rows),
        bandwidth=topology.chip.network_bandwidth,
        seconds=sum(c["seconds"] for c in rows),
        exposed_seconds=sum(c["exposed_seconds"] for c in rows),
    )


def dearest(module, timeline, clock, most=15):
    """Returns the operations that take the most seconds of a step, all their runs together."""
    rows = [
        dict(
            seconds=op.cycles * times / clock,
            count=times,
            name=op.name,
            kind=kind_of(module, op),
            part=part_of(op.op_name),
            shape=re.sub(r"\{[^}]*\}", "", op.shape)[:60],
            op_name=op.op_name,
        )
        for computation, times in timeline.trips.items()
        for op in module.computations[computation]
        if op.cycles
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:most]


def summed(rows, *keys, of="seconds"):
    """Returns [(values of the keys, sum)] of a list of dicts, the largest first."""
    total = Counter()
    for row in rows:
        total[tuple(str(row[k]) for k in keys)] += row[of]
    return total.most_common()


def duration(seconds):
    """Returns "  1.234 s", "  1.234 ms" or "  1.234 us"."""
    unit, scale = next((u for u in (("s ", 1), ("ms", 1e3)) if seconds * u[1] >= 1), ("us", 1e6))
    return f"{seconds * scale:8.3f} {unit}"


def size(num_bytes):
    """Returns "  1.23 GiB" or "  1.23 MiB"."""
    unit, scale = ("GiB", GiB) if num_bytes >= GiB / 100 else ("MiB", 2**20)
    return f"{num_bytes / scale:7.2f} {unit}"


def text(r):
    """Returns a report as lines for a terminal."""
    mesh = " ".join(f"{axis}={n}" for axis, n in r["mesh"].items())
    budget = ", ".join(f"{n} {name}" for name, n in r["budget"].items() if n)
    assumed = ", ".join(f"{name} {n:g}" for name, n in r["assumed"].items())
    lines = [
        f"{r['config']} on {r['topology']}: {r['chips']} chips, mesh {mesh}",
        f"{r['rows']} rows a step, slots of a row: {budget}; remat {r['remat']}",
        f"assumed: full rows, {assumed}",
        "",
        *memory_text(r),
    ]
    return "\n".join(lines + (time_text(r) if "seconds" in r else []))


def memory_text(r):
    verdict = f"FITS, {size(r['margin_bytes']).strip()} free"
    if not r["fits"]:
        verdict = f"DOES NOT FIT, {size(-r['margin_bytes']).strip()} too much"
    return [
        f"memory of a chip: {size(r['peak_bytes']).strip()} of {size(r['hbm_bytes']).strip()}: "
        + verdict,
        f"  arguments    {size(r['argument_bytes'])}",
        *(f"      {size(n)}  {name}" for name, n in r["arguments"].items()),
        f"  temporaries  {size(r['temporary_bytes'])}, the largest at the peak:",
        *(f"      {size(n)}  {name[-90:]}" for name, n in r["peak_buffers"][:6]),
        f"compiled in {r['compile_seconds']:.0f} s with jax {r['versions']['jax']}, libtpu "
        f"{r['versions']['libtpu']}",
    ]


def mfu_text(r):
    mfu = r["mfu_estimate"]
    return "unknown (loops are not counted)" if mfu is None else f"{mfu:.3f}"


def time_text(r):
    def share(seconds):
        return f"{duration(seconds)} {seconds / r['seconds']:6.1%}"

    def table(title, rows):
        return [title, *(f"  {' '.join(key):24s} {share(s)}" for key, s in rows)]

    floors = r["roofline"]
    return [
        "",
        f"a step: {duration(r['seconds']).strip()}, estimated MFU {mfu_text(r)}, "
        f"{r['tokens_per_second_per_chip']:,.0f} tokens/s/chip",
        f"  operations               {share(r['op_seconds'])}",
        f"  Pallas kernels           {share(r['kernel_seconds'])}",
        f"  exposed communication    {share(r['exposed_communication_seconds'])}",
        f"  floor of the matmuls     {share(floors['matmul_seconds'])}",
        f"  floor of the memory      {share(floors['hbm_seconds'])}",
        *table("operations by kind", summed(r["ops"], "kind")[:10]),
        *table("operations by part", summed(r["ops"], "part", "direction")[:12]),
        *kernels_text(r, share),
        *collectives_text(r),
        "dearest operations",
        *(
            f"  {share(d['seconds'])}  {d['count']:g} x {d['name']} {d['shape']} "
            f"{d['op_name'][-60:]}"
            for d in r["dearest"][:8]
        ),
        *map(loop_text, r["uncounted_loops"]),
        f"true FLOPs of a step: {r['flops']:.4g} ("
        + ", ".join(f"{part} {n:.3g}" for part, n in r["flops_by_part"].items())
        + ")",
        "",
        r["formula"],
        f"Left out: {r['leaves_out']}.",
    ]


def kernels_text(r, share):
    def efficiency(kernel):
        if not kernel["estimated"]:
            return "HAS NO CostEstimate: counted as nothing"
        value = kernel["efficiency"]
        return f"{value:.2f} of its roofline" if value else "at its roofline, not simulated"

    lines = [
        f"  {share(k['seconds'])}  {k['count']:g} x {k['name']} ({k['part']} {k['direction']}), "
        + efficiency(k)
        for k in sorted(r["kernels"], key=lambda k: -k["seconds"])
    ]
    return ["Pallas kernels", *lines] if lines else []


def collectives_text(r):
    keys = "kind", "axes", "part", "direction"
    exposed = dict(summed(r["collectives"], *keys, of="exposed_seconds"))
    lines = [
        f"  {size(n)} {duration(exposed[k])} exposed  {k[0]} over {k[1]} ({k[2]} {k[3]})"
        for k, n in summed(r["collectives"], *keys, of="bytes")[:14]
    ]
    lines = ["collectives (bytes of the arrays, all calls)", *(lines or ["  none"])]
    return lines + network_text(r["between_slices"])


def network_text(n):
    if n is None:
        return []
    sent, least, exposed = size(n["sent_bytes"]), duration(n["seconds"]), n["exposed_seconds"]
    return [
        f"between {n['slices']} slices, over {n['axis']}: a chip sends {sent.strip()} in "
        f"{n['count']:g} transfers ({', '.join(n['kinds'])}), {least.strip()} at the least with "
        f"its share of the network ({n['bandwidth'] / 1e9:g} GB/s by the data sheet), of which "
        f"{duration(exposed).strip()} exposed"
    ]


def loop_text(loop):
    trips = loop["trips_assumed"]
    return (
        f"loop with a run-time trip count, {loop['times']:g} times: {loop['op_name'][-80:]}, "
        f"{duration(loop['seconds_of_a_trip']).strip()} a trip, "
        + (f"{trips:g} trips assumed" if trips else "UNCOUNTED beyond one trip")
    )
