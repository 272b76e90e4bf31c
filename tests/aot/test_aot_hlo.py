"""The parser of the compiler's text, on snippets of it."""

import pytest

from vlmjax.aot import hlo

LOOP = """
HloModule jit_f, is_scheduled=true

%cond.1 (p.1: (s32[], f32[8], s32[])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(256)S(1)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  BOUND
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

%body.1 (p.2: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  ROOT %p.2 = (s32[]{:T(128)}, f32[8]{0:T(256)S(1)}, s32[]{:T(128)}) parameter(0)
}

ENTRY %main.1 (x.1: f32[8], n.2: s32[]) -> f32[8] {
  %x.1 = f32[8]{0:T(256)S(1)} parameter(0)
  %n.2 = s32[]{:T(128)} parameter(1)
  %c.0 = s32[]{:T(128)} constant(2)
  %c.9 = s32[]{:T(128)} constant(9)
  %copy.1 = s32[]{:T(128)} copy(%CARRIED)
  %t.1 = (s32[]{:T(128)}, f32[8], s32[]) tuple(%c.0, %x.1, /*index=2*/%copy.1)
  %w.1 = (s32[]{:T(128)}, f32[8], s32[]) while(%t.1), condition=%cond.1, body=%body.1
  ROOT %y.1 = f32[8]{0:T(256)S(1)} get-tuple-element(%w.1), index=1
}
"""
CONSTANT = "%n.1 = s32[]{:T(128)} constant(30)"
ELEMENT = "%n.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=2"


@pytest.mark.parametrize(
    ("bound", "carried", "trips"),
    [(CONSTANT, "n.2", 28), (ELEMENT, "c.9", 7), (ELEMENT, "n.2", None)],
)
def test_trips(bound, carried, trips):
    module = hlo.parse(LOOP.replace("BOUND", bound).replace("CARRIED", carried))
    assert module.entry == "main.1" and set(module.computations) == {"cond.1", "body.1", "main.1"}
    loop = next(op for op in module.computations["main.1"] if op.kind == "while")
    assert loop.attribute("body") == "body.1" and loop.operands == ("t.1",)
    assert hlo.trips(module, "main.1", loop) == trips


def test_instruction():
    op = hlo.instruction(
        "  ROOT %fusion.5 = (bf16[16,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%a.1, "
        "/*index=5*/%b-c.2), kind=kOutput, calls=%fused.7, "
        'metadata={op_name="jit(f)/jvp(llm)/dot"}, '
        'backend_config={"window_config":{"estimated_cycles":"1234","kernel_window_bounds":[]}}'
    )
    assert (op.name, op.kind, op.operands) == ("fusion.5", "fusion", ("a.1", "b-c.2"))
    assert op.shape == "(bf16[16,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)})"
    assert (op.attribute("calls"), op.op_name) == ("fused.7", "jit(f)/jvp(llm)/dot")
    assert (op.cycles, op.target, op.root) == (1234, None, True)
    assert hlo.instruction("}") is None


def test_metadata_over_several_lines():
    text = LOOP.replace("BOUND", CONSTANT).replace(
        "copy(%CARRIED)", 'copy(%n.2), frontend_attributes={kernel={\n"xprof_metadata"=1\n}}, x=1'
    )
    assert len(hlo.parse(text).computations["main.1"]) == 8


def test_num_bytes():
    shape = "(f32[2,3]{1,0:T(8,128)S(1)}, bf16[4], pred[], s4[8], f8e4m3fn[3], u32[]{:S(2)})"
    assert hlo.num_bytes(shape) == 24 + 8 + 1 + 4 + 3 + 4


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x=1", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x=1", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x=1", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("channel_id=1, source_target_pairs={{0,1},{1,0}}, x=1", [[0, 1], [1, 0]]),
    ],
)
def test_members(text, groups):
    assert hlo.members(text) == groups
