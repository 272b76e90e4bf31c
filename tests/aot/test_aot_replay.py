"""The replay of a schedule on a clock of round numbers: 1 cycle is 1 s, 1 byte 1 s everywhere."""

from types import SimpleNamespace

import numpy as np
import pytest

from vlmjax.aot import hlo
from vlmjax.aot.replay import Machine, direction_of, part_of, replay

CHIP = SimpleNamespace(clock=1.0, hbm_bandwidth=1.0, host_bandwidth=0.5, network_bandwidth=0.1)
TOPOLOGY = SimpleNamespace(
    chip=CHIP,
    slices=1,
    collective_seconds=lambda kind, size, members: float(size),
    sent_bytes=lambda kind, size: size / 2,
)
MESH = SimpleNamespace(devices=np.arange(4).reshape(2, 2), axis_names=("data", "fsdp"))
MACHINE = Machine(TOPOLOGY, MESH, peak=10.0)
TIMES = '"estimated_cycles":"%d"'


def program(*lines, more=""):
    body = "\n  ".join(["%x = f32[1]{0} parameter(0)", *lines])
    return hlo.parse(f"{more}\nENTRY %main (x: f32[1]) -> f32[1] {{\n  {body}\n}}\n")


def work(name, cycles, op_name="jit(step)/jvp(llm)/dot"):
    return (
        f'%{name} = f32[1]{{0}} add(%x), metadata={{op_name="{op_name}"}}, '
        f"backend_config={{{TIMES % cycles}}}"
    )


START = (
    "%s = (u8[1]{0}, u8[30]{0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1},{2,3}}"
)
DONE = "%d = u8[30]{0} all-gather-done(%s)"


@pytest.mark.parametrize(("between", "exposed"), [(0, 30), (10, 20), (30, 0), (50, 0)])
def test_what_work_does_not_hide_is_exposed(between, exposed):
    line = replay(program(work("a", 5), START, work("b", between), DONE, work("c", 7)), MACHINE)
    assert line.exposed_seconds == exposed
    assert line.op_seconds == 12 + between
    (row,) = line.collectives
    assert (row["kind"], row["bytes"], row["axes"]) == ("all-gather", 30, ["fsdp"])
    assert row["overlapped"] and row["exposed_seconds"] == exposed


def test_a_synchronous_collective_is_exposed_whole():
    reduce = "%r = u8[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%z"
    line = replay(program(work("a", 5), reduce), MACHINE)
    assert (line.exposed_seconds, line.collectives[0]["axes"]) == (8, ["data"])


def test_a_fusion_of_all_reduce_and_slice_is_a_reduce_scatter():
    more = """%scatter (p: u8[8]) -> u8[2] {
  %p = u8[8] parameter(0)
  %r = u8[8] all-reduce(%p), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%z
  ROOT %s = u8[2] dynamic-slice(%r)
}"""
    lines = "%f = u8[2] fusion(%x), kind=kCustom, calls=%scatter", work("a", 1)
    (row,) = replay(program(*lines, more=more), MACHINE).collectives
    assert (row["kind"], row["bytes"], row["overlapped"]) == ("reduce-scatter", 8, False)


def test_an_async_computation_is_a_collective():
    more = """%wrapped (p: u8[8]) -> u8[2] {
  %p = u8[8] parameter(0)
  ROOT %r = u8[2] reduce-scatter(%p), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%z
}"""
    start = "%s = ((u8[8]), u8[2], s32[]) async-start(%x), calls=%wrapped"
    line = replay(program(start, work("a", 1), "%d = u8[2] async-done(%s)", more=more), MACHINE)
    assert (line.exposed_seconds, line.collectives[0]["bytes"]) == (3, 4)


def test_the_sparse_core_begins_when_it_has_data():
    more = """%called (p: u8[8]) -> u8[30] {
  %p = u8[8] parameter(0)
  ROOT %r = u8[30] all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}
}
%wrapped (p: u8[8]) -> u8[30] {
  %p = u8[8] parameter(0)
  ROOT %c = u8[30] custom-call(%p), custom_call_target="x", called_computations={%called}
}"""
    lines = (
        '%s = ((), (), s32[8]) async-start(), async_execution_thread="sparsecore", calls=%wrapped',
        work("a", 10),
        "%u = ((u8[8]), u8[30], s32[8]) async-update(%s, %x)",
        work("b", 20),
        "%d = u8[30] async-done(%u)",
    )
    line = replay(program(*lines, more=more), MACHINE)
    assert (line.op_seconds, line.exposed_seconds) == (30, 10)
    assert line.collectives[0]["axes"] == ["fsdp"] and line.collectives[0]["overlapped"]


ACROSS = """is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="%s",\
_xla_megascale_transfer_type="ALL_REDUCE"}"""


@pytest.mark.parametrize(("between", "exposed"), [(0, 20), (15, 5), (40, 0)])
def test_what_goes_to_other_slices_begins_when_it_is_sent(between, exposed):
    """Half of 4 bytes, at 0.1 bytes a second; links and memory are free meanwhile."""
    lines = [
        f"%s = (u8[4]{{0}}, u32[], token[]) send(%x, %t), {ACROSS % 'psum.1_0'}",
        work("b", between),
        f"%r = (u8[4]{{0}}, u32[], token[]) recv(%t), {ACROSS % 'psum.1_0'}",
        f"%e = token[] send-done(%s), {ACROSS % 'psum.1_0'}",
        f"%d = (u8[4]{{0}}, token[]) recv-done(%r), {ACROSS % 'psum.1_0'}",
    ]
    line = replay(program(work("a", 5), *lines), MACHINE)
    assert (line.exposed_seconds, line.op_seconds) == (exposed, 5 + between)
    (row,) = line.collectives
    assert (row["kind"], row["axes"], row["part"]) == ("all-reduce", ["data"], "network")
    assert (row["bytes"], row["sent_bytes"], row["seconds"]) == (4, 2, 20)


def test_two_collectives_share_the_links_of_an_axis():
    """The second starts when the first is through; over another axis both go at once."""
    other = START.replace("%s", "%s2").replace("{{0,1},{2,3}}", "{{0,2},{1,3}}")
    for second, exposed in ((START.replace("%s", "%s2"), 40), (other, 10)):
        lines = START, second, work("a", 20), DONE, DONE.replace("%d", "%d2").replace("%s", "%s2")
        assert replay(program(*lines), MACHINE).exposed_seconds == exposed


def test_a_chain_of_fusions_is_one_collective():
    """As XLA:TPU writes an all-gather that goes on inside matmuls."""
    gather = "%g = u8[30]{0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4] {'a'}"
    more = "\n".join(
        f"%{name} (p: u8[1]) -> u8[1] {{\n  %p = u8[1]{{0}} parameter(0)\n  {gather}\n  {last}\n}}"
        for name, last in (
            ("one", 'ROOT %q = u8[1] custom-call(%g), custom_call_target="AsyncCollectiveStart"'),
            ("async_collective_fusion.2", "ROOT %q = f32[1] convolution(%p, %p)"),
            ("three", 'ROOT %q = u8[1] custom-call(%g), custom_call_target="AsyncCollectiveDone"'),
        )
    )
    step = work("b", 10).replace("add(%x)", "fusion(%s), calls=%async_collective_fusion.2")
    line = replay(
        program(
            "%s = u8[1]{0} fusion(%x), kind=kCustom, calls=%one",
            step,
            work("c", 15),
            "%d = u8[1]{0} fusion(%s), kind=kCustom, calls=%three",
            more=more,
        ),
        MACHINE,
    )
    assert (line.op_seconds, line.exposed_seconds, len(line.collectives)) == (25, 5, 1)
    assert line.collectives[0]["axes"] == ["data", "fsdp"]
    assert line.ops["matmul", "llm", "forward"] == 10


def loop(bound):
    return f"""
%cond (p: (s32[])) -> pred[] {{
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] {bound}
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%body (p: (s32[])) -> (s32[]) {{
  %p = (s32[]) parameter(0)
  %x = f32[1] parameter(1)
  {work("inner", 3, "jit(step)/transpose(jvp(vision))/rematted_computation/x")}
  {START}
  ROOT {DONE}
}}
"""


WHILE = (
    "%t = (s32[]) tuple(%x)",
    "%w = (s32[]) while(%t), condition=%cond, body=%body, "
    'metadata={op_name="jit(step)/jvp()/while"}',
)


def test_loops_count_their_trips():
    line = replay(program(*WHILE, more=loop("constant(4)")), MACHINE)
    assert (line.op_seconds, line.exposed_seconds) == (12, 120)
    assert line.ops["add", "vision", "recompute"] == 12
    assert (line.collectives[0]["count"], line.collectives[0]["part"]) == (4, "loss")
    assert line.trips["body"] == 4 and not line.uncounted


def test_loops_with_run_time_trips_are_named():
    module = program(*WHILE, more=loop("parameter(1)"))
    line = replay(module, MACHINE)
    (row,) = line.uncounted
    assert (row["name"], row["seconds_of_a_trip"], row["trips_assumed"]) == ("w", 33, None)
    assert line.op_seconds == 3
    line = replay(module, MACHINE._replace(dynamic_trips={"loss": 5}))
    assert (line.op_seconds, line.uncounted[0]["trips_assumed"]) == (15, 5)


def test_the_dearest_branch_counts():
    more = "\n".join(
        f"%b{n} (p: f32[1]) -> f32[1] {{\n  %x = f32[1] parameter(0)\n  {work('w', n)}\n}}"
        for n in (3, 8)
    )
    branch = "%c = f32[1] conditional(%x, %x, %x), branch_computations={%b3, %b8}"
    assert replay(program(branch, more=more), MACHINE).op_seconds == 8


def test_kernels_take_their_roofline_over_the_efficiency():
    call = (
        '%attend.3 = f32[1] custom-call(%x), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(step)/transpose(jvp(vision))/attend"}, '
        'backend_config={"custom_call_config":{"cost_estimate":'
        '{"bytes_accessed":"4","flops":"100","transcendentals":"0"}}}'
    )
    line = replay(program(call, call.replace(".3", ".4")), MACHINE)
    assert (line.kernel_seconds, line.op_seconds) == (20, 0)
    line = replay(program(call), MACHINE._replace(efficiency={"vision/attend": 0.5}))
    (row,) = line.kernels.values()
    assert (row["name"], row["part"], row["direction"]) == ("attend", "vision", "backward")
    assert (row["seconds"], row["flops"], row["count"]) == (20, 100, 1)
    silent = program(call.replace("cost_estimate", "other"))
    assert not next(iter(replay(silent, MACHINE).kernels.values()))["estimated"]


def test_memory_is_waited_for():
    copy = "%c = (u8[9]{0:S(1)}, u8[9]{0}, u32[]) copy-start(%x)"
    line = replay(program(copy, work("a", 5), "%e = u8[9]{0:S(1)} copy-done(%c)"), MACHINE)
    assert (line.op_seconds, line.ops["wait for memory", "other", "forward"]) == (9, 4)
    host = copy.replace("{0:S(1)}", "{0:S(5)}")
    line = replay(program(host, "%e = u8[9]{0:S(1)} copy-done(%c)"), MACHINE)
    assert line.op_seconds == 18


def test_operations_without_estimate_are_read_and_written_once():
    line = replay(program("%g = u8[6]{0} gather(%x)"), MACHINE)
    assert line.assumed == line.op_seconds == 12


def test_parts():
    assert part_of("jit(train_step)/transpose(jvp(llm))/while/body") == "llm"
    assert part_of("jit(train_step)/jvp()/shard_map/while") == "loss"
    assert part_of("jit(train_step)/sqrt") == "optimizer"
    assert part_of("convert.3", "vision") == part_of("jit(train_step)/cos", "vision") == "vision"
    assert direction_of("jit(f)/transpose(jvp(llm))/checkpoint/rematted_computation") == "recompute"
