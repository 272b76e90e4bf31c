"""Replays the scheduled program on a clock: where the seconds of a step go.

The instructions run one after the other, in the order XLA chose, on three resources. The core runs
an operation for the cycles XLA estimates, or a Pallas kernel for its roofline time. An asynchronous
collective occupies the links of its mesh axes from its start; its end waits until they are done,
and what the core waits is the exposed communication. An asynchronous copy does the same to the
memory, or to the host's. Loop bodies are replayed once and multiplied by their trips.

What goes to other slices is no collective in the program of a slice: chips send to their hosts what
these exchange, and receive the result.
"""

import dataclasses
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from vlmjax import sharding
from vlmjax.aot import hlo

FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
FREE += ("partition-id", "replica-id", "opt-barrier", "add-dependency")
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "AssumeGatherIndicesInBound")
EXCHANGE = ("send", "send-done", "recv", "recv-done")  # of a chip with its host
BETWEEN_SLICES = "xla_megascale_runtime"  # the host passes it on
HOST = 5  # memory space of the host in layouts
PARTS = ("vision", "connector", "llm")


class Machine(NamedTuple):
    """What the clock is set by.

    Attributes:
      topology: `topology.Topology`.
      mesh: the mesh, whose flat order is that of XLA's partitions.
      peak: FLOP/s of a chip.
      efficiency: {"part/kernel": share of its roofline that a simulation reached}.
      dynamic_trips: {part: trips} of loops whose trip count is data.
    """

    topology: object
    mesh: object
    peak: float
    efficiency: dict = {}
    dynamic_trips: dict = {}


@dataclasses.dataclass
class Timeline:
    """Seconds and events of one step of one chip.

    Attributes:
      ops: {(kind, part, direction): seconds} of what XLA compiled, waiting for memory included.
      kernels: {(name, part, direction): dict} of Pallas calls.
      collectives: list of dict, one for each instruction.
      assumed: seconds in `ops` that XLA gives no estimate of.
      uncounted: list of dict, the loops whose trips are unknown.
      trips: {computation: times it runs}.
    """

    ops: Counter = dataclasses.field(default_factory=Counter)
    kernels: dict = dataclasses.field(default_factory=dict)
    collectives: list = dataclasses.field(default_factory=list)
    assumed: float = 0.0
    uncounted: list = dataclasses.field(default_factory=list)
    trips: Counter = dataclasses.field(default_factory=Counter)

    @property
    def op_seconds(self):
        return sum(self.ops.values())

    @property
    def kernel_seconds(self):
        return sum(k["seconds"] for k in self.kernels.values())

    @property
    def exposed_seconds(self):
        return sum(c["exposed_seconds"] for c in self.collectives)


def part_of(op_name, default="other"):
    """Returns the part of the model that an operation's path of named scopes belongs to.

    "loss" has the token embedding too: what is differentiated and in no module. Names that XLA
    made itself, or lost the scopes of, count to the loop they are in.

    Args:
      op_name: the path.
      default: part of the loop.
    """
    found = re.search(rf"\b({'|'.join(PARTS)})\b", op_name)
    if found:
        return found[1]
    if default != "other" or not op_name.startswith("jit("):
        return default
    return "loss" if "jvp(" in op_name else "optimizer"


def direction_of(op_name):
    """Returns "forward", "backward" or "recompute" (what remat does again)."""
    if "rematted_computation" in op_name:
        return "recompute"
    return "backward" if "transpose(" in op_name else "forward"


def kind_of(module, op):
    """Returns the kind of work of an operation: "matmul", "fusion" (elementwise), "copy", ..."""
    kinds = {op.kind} if op.kind != "fusion" else {x.kind for x in module.inside(op)}
    for kind in ("convolution", "dot", "scatter", "gather", "sort"):
        if kind in kinds:
            return "matmul" if kind in ("convolution", "dot") else kind
    return op.kind


def collective_of(module, op):
    """Returns (the instruction with the replica groups, its role), or (None, None).

    A collective is one instruction ("sync"), a "start" and a "done" (of instructions, or of a
    computation run by the SparseCore), or a chain of fusions: one that starts it, some that do
    other work while it goes on ("step"), one that ends it.
    """
    base = re.sub("-(start|done)$", "", op.kind)
    if base in hlo.COLLECTIVES:
        return op, op.kind[len(base) + 1 :] or "sync"
    inside = list(module.inside(op))
    found = next((x for x in inside if re.sub("-start$", "", x.kind) in hlo.COLLECTIVES), None)
    if found is None:
        return None, None
    targets = {x.target for x in inside}
    if op.kind == "async-start" or "AsyncCollectiveStart" in targets:
        return found, "start"
    if "AsyncCollectiveDone" in targets:
        return found, "done"
    step = "async_collective_fusion" in (op.attribute("calls") or "")
    return found, "step" if step else "sync"


def exchange_of(op):
    """Returns the name that a send to other slices and the receipt of the result have in common."""
    found = re.search(r'_host_transfer_rendezvous="([^"]*)"', op.text)
    return found and found[1]


@dataclasses.dataclass
class _Event:
    """Something that goes on beside the core.

    Attributes:
      seconds: it takes once begun.
      on: what it occupies: mesh axes, "memory", "host" or the network between slices.
      row: the collective it is, or None for a copy.
      until: when it is done; None before it has begun.
    """

    seconds: float
    on: tuple
    row: dict | None = None
    until: float | None = None

    def begin(self, now, busy):
        self.until = max([now, *(busy.get(x, 0.0) for x in self.on)]) + self.seconds
        busy |= dict.fromkeys(self.on, self.until)
        return self


class _Clock:
    """The state of one replay."""

    def __init__(self, module, machine):
        self.module, self.machine, self.total = module, machine, Timeline()
        self.chip = machine.topology.chip
        ops = [op for ops in module.computations.values() for op in ops]
        begun = {op.name: op.operands[0] for op in ops if op.kind == "async-update"}
        results = {op.operands[0]: op.shape for op in ops if op.kind.endswith("-done")}
        self.exchanges = {op.name: exchange_of(op) for op in ops if op.kind == "recv"}
        self.results = {begun.get(name, name): shape for name, shape in results.items()}

    def run(self, computation, times, part):
        """Replays a computation that runs `times` times in all; returns the seconds of one."""
        now, busy, pending = 0.0, {}, {}
        self.total.trips[computation] += times
        for op in self.module.computations[computation]:
            if op.kind in FREE or op.target in FREE_CALLS:
                continue
            found, role = collective_of(self.module, op)
            name = op.op_name or (found.op_name if found else "")
            key = part_of(name, part), direction_of(name)
            if op.kind == "while":
                now += self.loop(computation, op, times, key[0])
            elif op.kind in ("call", "conditional"):
                now += self.branches(op, times, key[0])
            elif op.kind in EXCHANGE and BETWEEN_SLICES in op.text:
                if op.kind == "send":
                    pending[exchange_of(op)] = self.exchange(op, times).begin(now, busy)
                elif op.kind == "recv-done":
                    now = self.finish(pending.pop(self.exchanges[op.operands[0]]), now, times, key)
            elif role == "start" or (op.kind.endswith("-start") and role is None):
                event = self.event(op, found, role, times, key)
                # On the SparseCore a start without operands waits for an update that has them.
                later = op.kind == "async-start" and not op.operands
                pending[self.thread(op, found)] = event if later else event.begin(now, busy)
            elif op.kind == "async-update":
                event = pending.pop(op.operands[0])
                pending[op.name] = event if event.until else event.begin(now, busy)
            elif role == "sync":
                event = self.event(op, found, role, times, key).begin(now, busy)
                now = self.finish(event, now, times, key)
            elif role == "done" or op.kind.endswith("-done"):
                event = pending.pop(self.thread(op, found), None)
                now = self.finish(event, now, times, key) if event else now
            else:
                now += self.operation(op, times, key)
        return now

    def finish(self, event, now, times, key):
        """Returns the time after the core has waited for an event."""
        wait = max(event.until - now, 0.0)
        if event.row is None:
            self.total.ops["wait for memory", *key] += wait * times
        else:
            event.row["exposed_seconds"] += wait * times
        return now + wait

    def thread(self, op, found):
        """What links the end of something asynchronous to its start."""
        if op.kind == "fusion":
            return "channel", found.attribute("channel_id")
        return op.name if op.kind.endswith("-start") else op.operands[0]

    def loop(self, computation, op, times, part):
        trips = hlo.trips(self.module, computation, op)
        expected = self.machine.dynamic_trips.get(part)
        counted = trips if trips is not None else expected or 1
        # The loop over micro-batches belongs to no part.
        inside = "other" if part == "optimizer" else part
        seconds = self.run(op.attribute("body"), times * counted, inside)
        if trips is None:
            self.total.uncounted.append(
                dict(
                    name=op.name,
                    op_name=op.op_name,
                    part=part,
                    seconds_of_a_trip=seconds,
                    times=times,
                    trips_assumed=expected,
                )
            )
        return seconds * counted

    def branches(self, op, times, part):
        """The dearest branch counts, as if it were always taken."""
        names = re.findall(r"%([\w.\-]+)", op.text)
        branches = [n for n in names if n in self.module.computations]

        def seconds(branch):
            return _Clock(self.module, self.machine).run(branch, 1, part)

        return self.run(max(branches, key=seconds), times, part) if branches else 0.0

    def event(self, op, found, role, times, key):
        """Returns the `_Event` of a collective, which is listed, or of a copy."""
        if found is None:
            moved = hlo.num_bytes(self.results.get(op.name, op.shape))
            if f"S({HOST})" in op.shape:
                return _Event(moved / self.chip.host_bandwidth, ("host",))
            return _Event(moved / self.chip.hbm_bandwidth, ("memory",))
        mesh = self.machine.mesh
        groups = hlo.members(found.text)
        places = [np.unravel_index(group, mesh.devices.shape) for group in groups]
        axes = tuple(
            axis
            for i, axis in enumerate(mesh.axis_names)
            if any(len(set(place[i])) > 1 for place in places)
        )
        kind = re.sub("-start$", "", found.kind)
        # The shape of a start has the operands too, and counters.
        shape = self.results.get(found.name, found.shape)
        size = hlo.num_bytes(shape)
        group = groups[0] if groups else range(mesh.devices.size // self.machine.topology.slices)
        size *= len(group) if kind == "reduce-scatter" else 1
        if op is not found and any(x.kind == "dynamic-slice" for x in self.module.inside(op)):
            kind = "reduce-scatter"  # an all-reduce of which each chip keeps its slice
        seconds = self.machine.topology.collective_seconds(
            kind, size, [mesh.devices.flat[i] for i in group]
        )
        row = dict(
            kind=kind,
            shape=re.sub(r"\{[^}]*\}", "", shape),
            axes=list(axes),
            part=key[0],
            direction=key[1],
            overlapped=role != "sync",
            count=times,
            bytes=size * times,
            seconds=seconds * times,
            exposed_seconds=0.0,
        )
        self.total.collectives.append(row)
        return _Event(seconds, axes, row)

    def exchange(self, op, times):
        """Returns the `_Event` of a send to other slices, after listing it."""
        kind = re.search(r'_megascale_transfer_type="(\w+)"', op.text)[1]
        kind = kind.lower().replace("_", "-")
        shape = op.shape.partition(", u32[]")[0]  # what follows are a counter and a token
        given = hlo.num_bytes(shape)
        sent = self.machine.topology.sent_bytes(kind, given)
        seconds = sent / self.chip.network_bandwidth
        row = dict(
            kind=kind,
            shape=re.sub(r"\{[^}]*\}|^\(", "", shape),
            axes=[sharding.ACROSS],
            part="network",  # where it comes from is not in the program
            direction="between slices",
            overlapped=True,
            count=times,
            bytes=given * times,
            sent_bytes=sent * times,
            seconds=seconds * times,
            exposed_seconds=0.0,
        )
        self.total.collectives.append(row)
        return _Event(seconds, ("network",), row)

    def operation(self, op, times, key):
        """Returns the seconds of an operation or kernel, after adding it to the totals."""
        if op.target == "tpu_custom_call":
            return self.kernel(op, times, key)
        cycles = op.cycles
        seconds = (cycles or 0) / self.chip.clock
        if cycles is None:
            # Read and written once, at the speed of the memory.
            seconds = 2 * hlo.num_bytes(op.shape) / self.chip.hbm_bandwidth
            self.total.assumed += seconds * times
        self.total.ops[kind_of(self.module, op), *key] += seconds * times
        return seconds

    def kernel(self, op, times, key):
        name = re.sub(r"(\.\d+|\.clone)+$", "", op.name)
        cost = re.search(r'"cost_estimate":\{([^}]*)\}', op.text)
        values = dict(re.findall(r'"(\w+)":"(\d+)"', cost[1])) if cost else {}
        flops, moved = int(values.get("flops", 0)), int(values.get("bytes_accessed", 0))
        roofline = max(flops / self.machine.peak, moved / self.chip.hbm_bandwidth)
        efficiency = self.machine.efficiency.get(f"{key[0]}/{name}")
        seconds = roofline / (efficiency or 1.0)
        row = self.total.kernels.setdefault(
            (name, *key),
            dict(name=name, part=key[0], direction=key[1], efficiency=efficiency)
            | dict(estimated=cost is not None, count=0, flops=0, bytes=0, seconds=0.0),
        )
        added = dict(count=1, flops=flops, bytes=moved, seconds=seconds)
        for field, value in added.items():
            row[field] += value * times
        return seconds


def replay(module, machine):
    """Returns the `Timeline` of a `hlo.Module` on a `Machine`."""
    clock = _Clock(module, machine)
    clock.run(module.entry, 1, "other")
    return clock.total
